pub fn run(_: &crate::cli::SoupArgs) -> anyhow::Result<()> {
    anyhow::bail!("under construction")
}
