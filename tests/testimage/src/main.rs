//! One static program with many names, run inside pods by the tests and the demo: servers that say who answered, clients
//! that ask, and processes that end, log, eat memory or wait in the ways a test needs.

mod applets {
    pub(crate) mod files;
    pub(crate) mod http;
    pub(crate) mod net;
    pub(crate) mod process;
    pub(crate) mod resolve;
}

use std::path::Path;
use std::process::ExitCode;

use applets::{files, http, net, process, resolve};

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let called_as = arguments.next().unwrap_or_default();
    let mut name =
        Path::new(&called_as).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if name.ends_with("testimage") {
        name = arguments.next().unwrap_or_default();
    }
    let arguments: Vec<String> = arguments.collect();
    match run(&name, &arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::from(1)
        }
    }
}

fn run(name: &str, arguments: &[String]) -> std::io::Result<u8> {
    match name {
        "http" => http::serve(arguments),
        "fetch" => http::fetch(arguments),
        "udp-echo" => net::udp_echo(arguments),
        "tcp-echo" => net::tcp_echo(arguments),
        "resolve" => resolve::resolve(arguments),
        "sleep" => process::sleep(arguments),
        "exit" => process::exit(arguments),
        "signal" => process::signal(arguments),
        "oom" => process::oom(arguments),
        "stress" => process::stress(arguments),
        "log" => process::log(arguments),
        "env" => process::env(arguments),
        "id" => process::id(),
        "tty-size" => process::tty_size(),
        "hostname" => process::hostname(),
        "echo" => {
            println!("{}", arguments.join(" "));
            Ok(0)
        }
        "true" => Ok(0),
        "false" => Ok(1),
        "cat" => files::cat(arguments),
        "ls" => files::ls(arguments),
        "write" => files::write(arguments),
        "tar" => files::tar(arguments),
        _ => {
            eprintln!("known commands: {}", oarlock_testimage::APPLETS.join(" "));
            Ok(127)
        }
    }
}

/// Reads one positional argument as a number.
pub(crate) fn number<T: std::str::FromStr>(arguments: &[String], position: usize, default: T) -> std::io::Result<T> {
    match arguments.get(position) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| std::io::Error::other(format!("{text:?} is not a number"))),
    }
}
