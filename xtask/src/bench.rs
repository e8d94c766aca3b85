//! `cargo xtask bench`: measurements of the release binaries, as tables and JSON.

#[derive(clap::Args)]
pub(crate) struct BenchFlags {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// Cold start of `oarlock up` with an empty data directory
    Up,
}

pub(crate) fn run(flags: &BenchFlags) -> anyhow::Result<()> {
    match flags.bench {
        Bench::Up => anyhow::bail!("up"),
    }
}
