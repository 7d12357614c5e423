pub fn run(_: &crate::cli::EvalArgs) -> anyhow::Result<()> {
    anyhow::bail!("under construction")
}
