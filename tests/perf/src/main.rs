//! Benchmarks of the release binaries in fresh namespaces: a table for people on standard output, JSON for machines after it.
//! Nothing here passes or fails by a time.

mod agent;
mod cluster;
mod cni;
mod commits;
mod cri;
mod dns;
mod list_server;
mod logs;
mod memory;
mod net;
mod netproxy;
mod peer;
mod pod;
mod proxy;
mod pull;
mod spans;
mod table;
mod up;

use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "oarlock-perf")]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Cold start of `oarlock up` with an empty data directory, stage by stage
    Up {
        /// How many cold starts
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Memory and CPU of every process of an idle cluster with the demo
    Memory {
        /// Seconds over which CPU time is measured
        #[arg(long, default_value_t = 20)]
        seconds: u64,
    },
    /// From POST of a pod to Ready, one pod at a time
    Pod {
        #[arg(long, default_value_t = 30)]
        rounds: usize,
    },
    /// Pods through the API beside others: at a rate, in bursts; memory and CPU of the agent
    Agent(agent::AgentFlags),
    /// The same work through CRI alone: sandbox, create, start, stop, remove, memory and a burst
    #[command(alias = "cri")]
    Runtime(cri::CriFlags),
    /// A cold pull of a large image from a registry on loopback
    Pull(pull::PullFlags),
    /// One container's output on its way into its log
    Logs(logs::LogFlags),
    /// The Service proxy with thousands of Services: load, changes, memory, connections
    Netproxy {
        /// How many Services, each with three endpoints
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 5_000, 10_000, 44_000])]
        services: Vec<usize>,
        /// Changes of each kind at each size
        #[arg(long, default_value_t = 100)]
        rounds: usize,
        /// Tracked flows among which stale ones are found; 0 leaves that out
        #[arg(long, default_value_t = 200_000)]
        tracked: usize,
    },
    /// ADD and DEL of the CNI plugins, beside the reference plugins where they are installed
    Cni {
        #[arg(long, default_value_t = 50)]
        rounds: usize,
        /// Pods that are attached before
        #[arg(long, default_value_t = 0)]
        present: usize,
        /// Milliseconds before each ADD, in which the kernel ends the namespace before
        #[arg(long, default_value_t = 100)]
        pause: u64,
    },
    /// Pod to pod: throughput and answers on one node, on one segment, by VXLAN and WireGuard, beside a bare veth pair
    Net {
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Seconds of each stream
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Small questions in each round
        #[arg(long, default_value_t = 2000)]
        questions: usize,
    },
    /// Cluster DNS: questions a second, the time of one, and how soon an answer follows its endpoint
    Dns {
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        #[arg(long, default_value_t = 5000)]
        rounds: usize,
        /// Changes of an endpoint
        #[arg(long, default_value_t = 50)]
        changes: usize,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let _ = rustls::crypto::ring::default_provider().install_default();
    oarlock_testkit::become_node();
    match arguments.bench {
        Bench::Up { rounds } => up::run(rounds),
        Bench::Memory { seconds } => memory::run(seconds),
        Bench::Pod { rounds } => pod::run(rounds),
        Bench::Agent(flags) => agent::run(&flags),
        Bench::Runtime(flags) => cri::run(&flags),
        Bench::Pull(flags) => pull::run(&flags),
        Bench::Logs(flags) => logs::run(&flags),
        Bench::Netproxy { services, rounds, tracked } => netproxy::run(&services, rounds, tracked),
        Bench::Cni { rounds, present, pause } => {
            cni::run(cni::Plan { rounds, present, pause: Duration::from_millis(pause) })
        }
        Bench::Net { rounds, seconds, questions } => net::run(rounds, seconds, questions),
        Bench::Dns { seconds, rounds, changes } => dns::run(seconds, rounds, changes),
    }
}
