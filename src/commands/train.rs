pub fn run(_: &crate::cli::TrainArgs) -> anyhow::Result<()> {
    anyhow::bail!("under construction")
}
