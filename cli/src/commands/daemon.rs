//! What every daemon does around its own work: logging, a small thread pool, signals, readiness.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use oarlock_supervise::notify_ready;
use oarlock_telemetry::Export;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::Settings;

/// Runs `main` until it ends or SIGTERM or SIGINT cancels its token. `threads` bounds the worker threads.
pub(crate) fn run<F, Fut>(settings: &Settings, threads: usize, main: F) -> anyhow::Result<ExitCode>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    run_traced(settings, threads, None, main)
}

/// As [`run`], with spans sent to a collector.
pub(crate) fn run_traced<F, Fut>(
    settings: &Settings,
    threads: usize,
    export: Option<&Export>,
    main: F,
) -> anyhow::Result<ExitCode>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    oarlock_telemetry::init_with(&settings.log, oarlock_telemetry::Format::Text, export)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(64)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let result = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(cancel_on_signal(shutdown.clone()));
        main(shutdown).await
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    oarlock_telemetry::flush(Duration::from_secs(2));
    result.map(|()| ExitCode::SUCCESS)
}

/// Cancels the token on the first SIGTERM or SIGINT.
pub(crate) async fn cancel_on_signal(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = shutdown.cancelled() => {}
    }
    shutdown.cancel();
}

/// Where a daemon of this machine that listens there is reached from this machine.
pub(crate) fn reached_at(listen: SocketAddr) -> SocketAddr {
    let own = match listen.ip() {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    SocketAddr::new(own, listen.port())
}

/// Says "ready" to the supervisor once `check` answers true, and logs it. Gives up quietly when `shutdown` comes first.
pub(crate) async fn announce_when<F, Fut>(name: &'static str, shutdown: CancellationToken, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let mut pause = Duration::from_millis(1);
    loop {
        let ready = tokio::select! {
            ready = check() => ready,
            () = shutdown.cancelled() => return,
        };
        if ready {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    if let Err(error) = notify_ready() {
        tracing::warn!(component = name, error = %error, "cannot tell the supervisor that this process is ready");
    }
    tracing::info!(component = name, "ready");
}
