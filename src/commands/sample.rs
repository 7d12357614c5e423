pub fn run(_: &crate::cli::SampleArgs) -> anyhow::Result<()> {
    anyhow::bail!("under construction")
}
