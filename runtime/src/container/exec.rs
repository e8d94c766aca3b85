//! Runs further processes in containers. How their streams reach a client is decided by the callers.

use std::fs;
use std::sync::Arc;

use oarlock_shim_api::{ErrorKind, Event, ExecReply, ExecRequest, Shim, ShimError};
use oarlock_streaming::TerminalSize;
use oci_spec::runtime::{BoxBuilder, Process};
use tokio::sync::broadcast;

use crate::core::Core;
use crate::error::Error;
use crate::state::{Container, blocking, new_id};

/// A process that runs in a container. Dropped before it ended, it is killed.
pub(crate) struct Session {
    shim: Shim,
    container_id: String,
    exec_id: String,
    events: broadcast::Receiver<Event>,
    ended: bool,
    /// The ends of its streams.
    pub(crate) streams: ExecReply,
}

/// Starts a process in a running container. `terminal` asks for a terminal, of that size where one is known.
pub(crate) async fn begin(
    core: &Arc<Core>,
    container_id: &str,
    command: &[String],
    terminal: Option<Option<TerminalSize>>,
    stdin: bool,
) -> Result<Session, Error> {
    if command.first().is_none_or(String::is_empty) {
        return Err(Error::Invalid("cmd: no command to execute".to_owned()));
    }
    let (container, sandbox) = super::running(core, container_id, "execute in it")?;
    let container_id = container.id();
    let shim = sandbox.living_shim("execute in it")?;
    let mut process = process_for(Process::clone(&*own_process(core, &container).await?), command.to_vec(), terminal);
    // Not as the container was asked for, but as its first process has it now: plugins have a say in it.
    process.set_oom_score_adj(None);
    let tty = terminal.is_some();
    let exec_id = new_id();
    let events = shim.subscribe();
    let request = ExecRequest { container_id: container_id.clone(), exec_id: exec_id.clone(), process, tty, stdin };
    let limit = core.config.shim_timeout;
    let streams = tokio::time::timeout(limit, shim.exec(request))
        .await
        .map_err(|_| Error::TimedOut { operation: format!("executing in container {container_id}"), limit })?
        .map_err(|error| of_engine(&container_id, error))?;
    Ok(Session { shim, container_id, exec_id, events, ended: false, streams })
}

/// The part of a specification that an exec is made from.
#[derive(serde::Deserialize)]
struct OwnProcess {
    process: Process,
}

/// The process of a container that runs, which cannot change any more.
async fn own_process(core: &Arc<Core>, container: &Arc<Container>) -> Result<Arc<Process>, Error> {
    if let Some(process) = container.process.get() {
        return Ok(process.clone());
    }
    let config = core.paths.bundle(&container.id()).config();
    let process = blocking("a bundle", move || {
        let bytes = fs::read(&config).map_err(Error::io("read", &config))?;
        let spec: OwnProcess = serde_json::from_slice(&bytes).map_err(|error| Error::Io {
            operation: "read",
            path: config.clone(),
            source: error.into(),
        })?;
        Ok(Arc::new(spec.process))
    })
    .await?;
    Ok(container.process.get_or_init(|| process).clone())
}

/// The container's own process with another command line.
fn process_for(mut process: Process, command: Vec<String>, terminal: Option<Option<TerminalSize>>) -> Process {
    process.set_args(Some(command)).set_terminal(Some(terminal.is_some()));
    if let Some(size) = terminal {
        let console = size
            .and_then(|TerminalSize { width, height }| BoxBuilder::default().width(width).height(height).build().ok());
        process.set_console_size(console);
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        process.set_env(Some(env));
    }
    process
}

fn of_engine(id: &str, error: ShimError) -> Error {
    match (&error, error.kind()) {
        (ShimError::Refused(remote), Some(ErrorKind::ExecutableNotFound | ErrorKind::NotExecutable)) => {
            Error::Exec { id: id.to_owned(), message: remote.message.clone() }
        }
        _ => Error::Shim { operation: format!("execute in container {id}"), source: error },
    }
}

impl Session {
    /// Waits for the end; 128 + signal for a process that was killed.
    pub(crate) async fn exit_code(&mut self) -> Result<i32, Error> {
        let lost = |source| Error::Shim {
            operation: format!("wait for a process in container {}", self.container_id),
            source,
        };
        loop {
            match self.events.recv().await {
                Ok(Event::ExecExited { id, exec_id, exit_code })
                    if id == self.container_id && exec_id == self.exec_id =>
                {
                    self.ended = true;
                    return Ok(exit_code);
                }
                // The container's end is the end of all that runs in it; the shim tells of each, but may be gone first.
                Ok(Event::Disconnected) | Err(_) => return Err(lost(ShimError::Disconnected)),
                Ok(_) => {}
            }
        }
    }

    /// Kills it.
    pub(crate) async fn kill(&self) {
        if let Err(error) = self.shim.exec_signal(&self.container_id, &self.exec_id, libc::SIGKILL).await
            && !error.is_not_found()
        {
            tracing::warn!(container.id = %self.container_id, %error, "process could not be killed");
        }
    }

    /// A handle to set the size of its terminal.
    pub(crate) fn resizer(&self) -> Resizer {
        Resizer {
            shim: self.shim.clone(),
            container_id: self.container_id.clone(),
            exec_id: Some(self.exec_id.clone()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let (shim, container_id, exec_id) = (self.shim.clone(), self.container_id.clone(), self.exec_id.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = shim.exec_signal(&container_id, &exec_id, libc::SIGKILL).await;
            });
        }
    }
}

/// Sets the size of a terminal.
#[derive(Clone)]
pub(crate) struct Resizer {
    pub(crate) shim: Shim,
    pub(crate) container_id: String,
    /// None: the container's own.
    pub(crate) exec_id: Option<String>,
}

impl Resizer {
    pub(crate) async fn resize(&self, width: u16, height: u16) {
        if let Err(error) = self.shim.resize(&self.container_id, self.exec_id.as_deref(), width, height).await {
            tracing::debug!(container.id = %self.container_id, %error, "terminal could not be resized");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_is_the_containers_process_with_another_command() {
        let mut process = Process::default();
        process.set_env(Some(vec!["A=1".into()])).set_no_new_privileges(Some(true));
        let exec = process_for(process, vec!["ls".into()], Some(Some(TerminalSize { width: 101, height: 33 })));
        let console = exec.console_size().expect("a size");
        assert_eq!((console.width(), console.height()), (101, 33));
        assert_eq!(exec.args().as_deref(), Some(&["ls".to_owned()][..]));
        assert_eq!(exec.env().as_deref(), Some(&["A=1".to_owned(), "TERM=xterm".to_owned()][..]));
        assert_eq!((exec.terminal(), exec.no_new_privileges()), (Some(true), Some(true)));
    }
}
