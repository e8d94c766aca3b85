//! `oarlock-shim`: one small process per pod that outlives every daemon.
//!
//! Owns the pod's containers as their parent: standard streams and logs, exit records, terminals, signals. It has one
//! epoll loop, and a thread for a log only while there is something to write to it (`stdio/writer.rs`); whatever needs
//! namespaces, much memory or patience happens in helper children.
//! Does not own: images, networks, specifications (the runtime daemon makes them), or any of Kubernetes.
//!
//! Start reading at `server.rs`; `helper.rs` explains the children, `engine/` and `exec/` what they do.

mod client;
mod container;
mod engine;
mod exec;
mod finished;
mod forked;
mod forward;
mod memory;
mod pidns;
mod poll;
mod reap;
mod requests;
mod seccomp;
mod server;
mod setup;
mod stdio;

use std::process::ExitCode;

fn main() -> ExitCode {
    let config = match setup::Config::parse(std::env::args_os().skip(1)) {
        Ok(config) => config,
        Err(message) => {
            eprintln!("oarlock-shim: {message}\n{}", setup::USAGE);
            return ExitCode::from(64);
        }
    };
    setup::run(config)
}
