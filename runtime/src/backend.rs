//! Connects streaming clients to processes, containers and ports: the streaming server's [`Backend`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use oarlock_streaming::{AttachParams, Backend, BoxRead, BoxWrite, ExecParams, Io, StreamError, TerminalSize};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::container;
use crate::container::exec::{self, Resizer};
use crate::core::Core;
use crate::error::Error;
use crate::fdio::FdStream;
use crate::state::blocking;

/// After a process ended, how long its output may take to reach a slow client. A process it left behind may hold the
/// stream open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long a client with a terminal has to say how large it is before the program starts without a size.
const FIRST_SIZE_LIMIT: Duration = Duration::from_millis(600);
/// How long a connection to a port of a pod may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Carries out what streaming clients ask for. Does not keep the daemon's state alive.
pub(crate) struct Streams {
    pub(crate) core: Weak<Core>,
}

impl Streams {
    fn core(&self) -> Result<Arc<Core>, StreamError> {
        self.core.upgrade().ok_or_else(|| StreamError::failed("the runtime is stopping"))
    }
}

#[async_trait]
impl Backend for Streams {
    async fn exec(&self, params: ExecParams, mut io: Io) -> Result<i32, StreamError> {
        let core = self.core()?;
        let terminal = match params.tty {
            true => Some(first_size(&mut io.resize).await),
            false => None,
        };
        let mut session =
            exec::begin(&core, &params.container_id, &params.command, terminal, params.stdin).await.map_err(failed)?;
        let streams = &mut session.streams;
        let output = match streams.terminal.take() {
            Some(terminal) => {
                let terminal = stream(terminal)?;
                let input = terminal.second().map_err(streaming("share the terminal"))?;
                Pumps { input: Some(input), keep_input: true, output: Some(terminal), error: None }
            }
            None => Pumps {
                input: streams.stdin.take().map(stream).transpose()?,
                keep_input: false,
                output: streams.stdout.take().map(stream).transpose()?,
                error: streams.stderr.take().map(stream).transpose()?,
            },
        };
        let resizer = session.resizer();
        let running = output.run(io, resizer);
        tokio::pin!(running);
        let code = tokio::select! {
            code = session.exit_code() => code.map_err(failed)?,
            // All output has ended; the process itself may go on.
            () = &mut running => return session.exit_code().await.map_err(failed),
        };
        // What it wrote last is still on its way.
        let _ = tokio::time::timeout(DRAIN_LIMIT, running).await;
        Ok(code)
    }

    async fn attach(&self, params: AttachParams, io: Io) -> Result<(), StreamError> {
        let core = self.core()?;
        let (container, sandbox) = container::running(&core, &params.container_id, "attach to it").map_err(failed)?;
        let id = container.id();
        let shim = sandbox.living_shim("attach to it").map_err(failed)?;
        // Taking the input and dropping it again would end it for everybody.
        let ends = if params.stdin { shim.attach(&id).await } else { shim.attach_output(&id).await };
        let ends = ends.map_err(Error::shim(format!("attach to container {id}"))).map_err(failed)?;
        let pumps = Pumps {
            input: ends.stdin.map(stream).transpose()?,
            keep_input: false,
            output: ends.stdout.map(stream).transpose()?,
            error: ends.stderr.map(stream).transpose()?,
        };
        pumps.run(io, Resizer { shim, container_id: id, exec_id: None }).await;
        Ok(())
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16, mut stream: DuplexStream) -> Result<(), StreamError> {
        let core = self.core()?;
        let record = core.index.sandbox(sandbox_id).map_err(failed)?.record();
        let netns = (!record.host_network).then(|| core.paths.sandbox(&record.id).namespaces().join("net"));
        let mut connection = connect(netns, port).await?;
        match tokio::io::copy_bidirectional(&mut stream, &mut connection).await {
            Ok(_) => Ok(()),
            // Either side going away is how such connections end.
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            Err(source) => Err(StreamError::Io { operation: "forward a port", source }),
        }
    }
}

/// Connects to a port on the pod's loopback, IPv4 first, as a process in the pod would.
async fn connect(netns: Option<std::path::PathBuf>, port: u16) -> Result<TcpStream, StreamError> {
    let connected = blocking("a port-forward", move || {
        let mut last = None;
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let address = SocketAddr::new(ip, port);
            let result = match &netns {
                Some(path) => oarlock_netns::tcp_connect_in(path, address, CONNECT_LIMIT)
                    .map_err(|error| Error::Invalid(format!("cannot enter the pod's network namespace: {error}")))?,
                None => std::net::TcpStream::connect_timeout(&address, CONNECT_LIMIT),
            };
            match result {
                Ok(stream) => return Ok(Ok(stream)),
                // The first refusal is the one that says something.
                Err(error) => last = last.or(Some(error)),
            }
        }
        Ok(Err(last.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into())))
    })
    .await
    .map_err(failed)?;
    let stream = connected.map_err(|error| {
        StreamError::failed(format!(
            "failed to connect to localhost:{port} inside the pod's network namespace: {error}"
        ))
    })?;
    stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)).map_err(streaming("use the connection"))
}

/// The ends of a process's streams, and what connects them to a client's.
struct Pumps {
    input: Option<FdStream>,
    /// The client's end of input is not the process's: a terminal stays open.
    keep_input: bool,
    output: Option<FdStream>,
    error: Option<FdStream>,
}

impl Pumps {
    /// Copies until all output has ended or the client is gone.
    async fn run(self, io: Io, resizer: Resizer) {
        let Io { stdin, stdout, stderr, resize } = io;
        let input = pump_input(stdin, self.input, self.keep_input);
        let sizes = pump_sizes(resize, resizer);
        let output = async {
            tokio::join!(pump_output(self.output, stdout), pump_output(self.error, stderr));
        };
        // Input and sizes end with the output, not the other way round.
        tokio::select! {
            () = output => {}
            () = async { tokio::join!(input, sizes); std::future::pending::<()>().await } => {}
        }
    }
}

async fn pump_input(client: Option<BoxRead>, process: Option<FdStream>, keep: bool) {
    let (Some(mut client), Some(mut process)) = (client, process) else { return };
    let _ = tokio::io::copy(&mut client, &mut process).await;
    if keep {
        std::future::pending::<()>().await;
    }
}

async fn pump_output(process: Option<FdStream>, client: Option<BoxWrite>) {
    let Some(mut process) = process else { return };
    match client {
        Some(mut client) => {
            let _ = tokio::io::copy(&mut process, &mut client).await;
            let _ = client.shutdown().await;
        }
        // Read all the same: a process must not block because nobody looks.
        None => {
            let _ = tokio::io::copy(&mut process, &mut tokio::io::sink()).await;
        }
    }
}

/// The size that the client's terminal has now: a program that asks once, at its start, must see it.
async fn first_size(sizes: &mut mpsc::Receiver<TerminalSize>) -> Option<TerminalSize> {
    tokio::time::timeout(FIRST_SIZE_LIMIT, sizes.recv()).await.ok().flatten()
}

async fn pump_sizes(mut sizes: mpsc::Receiver<TerminalSize>, resizer: Resizer) {
    while let Some(TerminalSize { width, height }) = sizes.recv().await {
        resizer.resize(width, height).await;
    }
}

fn stream(fd: std::os::fd::OwnedFd) -> Result<FdStream, StreamError> {
    FdStream::new(fd).map_err(streaming("use a stream of the process"))
}

fn streaming(operation: &'static str) -> impl FnOnce(io::Error) -> StreamError {
    move |source| StreamError::Io { operation, source }
}

fn failed(error: Error) -> StreamError {
    match error {
        Error::NotFound { what, id } => StreamError::NotFound { what: format!("{what} {id:?}") },
        other => StreamError::failed(other.full_message()),
    }
}
