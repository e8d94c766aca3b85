//! The `oarlock` program: reads flags and configuration and starts the part that was asked for.
//!
//! Owns the command line, the file layout and `up`; every part itself is a library.

mod commands;
mod config;
mod host;
mod joined;
mod layout;
mod one_or_two;
mod pki;
mod reload;
mod runtime_config;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use config::{ConfigError, ConfigFlags};

/// Exit code for a configuration that cannot be used (EX_USAGE).
const EXIT_CONFIGURATION: u8 = 64;

#[derive(Parser)]
#[command(name = "oarlock", version = oarlock_version(), about = "Kubernetes on Linux machines in a few small binaries")]
struct Arguments {
    #[command(flatten)]
    config: ConfigFlags,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a whole single-node cluster and keep it running
    Up(commands::up::UpFlags),
    /// Make this machine a node of another machine's cluster and keep it running
    Join(commands::join::JoinFlags),
    /// The tokens by which machines join this cluster
    Token(commands::token::TokenFlags),
    /// Stop what `up --detach` or `join --detach` started
    Stop(commands::stop::StopFlags),
    /// Stop everything and remove all state: pods, mounts, namespaces, cgroups, links, tables, files
    Reset(commands::reset::ResetFlags),
    /// Apply the demo and fetch its page through the Service
    Demo(commands::demo::DemoFlags),
    /// Run the control plane: API server, controllers, scheduler
    Server,
    /// Run the CRI runtime daemon
    Runtime,
    /// Run the node agent (kubelet)
    Agent,
    /// Run the Service proxy and cluster DNS
    Netproxy,
    /// List, pull, import and remove images of the node's runtime
    Images(commands::images::ImagesFlags),
    /// Check this machine for what Oarlock needs
    Doctor,
    /// Print the version
    Version,
    /// Print a shell completion script
    Completion {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
}

/// Our version, with the Kubernetes version that the API speaks.
fn oarlock_version() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (Kubernetes v1.36.0)")
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) if error.downcast_ref::<ConfigError>().is_some() => {
            eprintln!("oarlock: {error:#}");
            ExitCode::from(EXIT_CONFIGURATION)
        }
        Err(error) => {
            eprintln!("oarlock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Version => {
            println!("oarlock {}", oarlock_version());
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            let mut command = <Arguments as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "oarlock", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Join(flags) => {
            let _ = rustls::crypto::ring::default_provider().install_default();
            commands::join::run(&arguments.config, flags)
        }
        command => {
            let settings = config::Settings::load(&arguments.config)?;
            let _ = rustls::crypto::ring::default_provider().install_default();
            match command {
                Command::Up(flags) => commands::up::run(settings, &arguments.config, flags),
                Command::Token(flags) => commands::token::run(&settings, flags),
                Command::Stop(flags) => commands::stop::run(&settings, flags),
                Command::Reset(flags) => commands::reset::run(&settings, flags),
                Command::Demo(flags) => commands::demo::run(&settings, &flags),
                Command::Server => commands::server::run(settings, &arguments.config),
                Command::Runtime => commands::runtime::run(settings),
                Command::Agent => commands::agent::run(settings),
                Command::Netproxy => commands::netproxy::run(settings, &arguments.config),
                Command::Images(flags) => commands::images::run(&settings, flags),
                Command::Doctor => commands::doctor::run(&settings),
                Command::Join(_) | Command::Version | Command::Completion { .. } => Ok(ExitCode::SUCCESS),
            }
        }
    }
}
