//! Exec and attach over SPDY: one stream each for error, stdin, stdout, stderr and resize, named by `streamType`.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::backend::{Backend, BoxRead, BoxWrite, Io};
use crate::command::{Command, STREAM_CREATION_TIMEOUT, Wanted, sizes_from};
use crate::idle;
use crate::spdy::{Role, Session, Stream};
use crate::status::{Ending, Version};

#[derive(Default)]
struct Streams {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Streams {
    /// Puts a stream in its place; a second one of a kind or one of an unknown kind is dropped, which resets it.
    fn place(&mut self, stream: Stream) {
        let place = match stream.headers.get("streamtype") {
            Some("error") => &mut self.error,
            Some("stdin") => &mut self.stdin,
            Some("stdout") => &mut self.stdout,
            Some("stderr") => &mut self.stderr,
            Some("resize") => &mut self.resize,
            _ => return,
        };
        if place.is_none() {
            *place = Some(stream);
        }
    }

    fn complete(&self, wanted: Wanted, version: Version) -> bool {
        self.error.is_some()
            && (self.stdin.is_some() || !wanted.stdin)
            && (self.stdout.is_some() || !wanted.stdout)
            && (self.stderr.is_some() || !wanted.stderr)
            && (self.resize.is_some() || !wanted.tty || version < Version::V3)
    }
}

/// Serves one exec or attach over `io` to its end.
pub(crate) async fn serve<IO: AsyncRead + AsyncWrite + Send + 'static>(
    io: IO,
    version: Version,
    command: Command,
    backend: Arc<dyn Backend>,
    idle_limit: Duration,
) {
    let mut session = Session::start(io, Role::Server);
    let pulse = session.pulse();
    let wanted = command.streams();
    let mut streams = Streams::default();
    let gathered = tokio::time::timeout(STREAM_CREATION_TIMEOUT, gather(&mut session, &mut streams, wanted, version));
    if !matches!(gathered.await, Ok(true)) {
        tracing::debug!("the client did not open all its streams");
        return;
    }
    let Some(mut error) = streams.error else { return };
    // The halves that are not used stay open until the end: a reset or FIN of them could confuse a client.
    let (stdin, _stdin_writer) = split(streams.stdin.filter(|_| wanted.stdin));
    let (_stdout_reader, stdout) = split(streams.stdout.filter(|_| wanted.stdout));
    let (_stderr_reader, stderr) = split(streams.stderr.filter(|_| wanted.stderr));
    let (resize, _resize_writer) = split(streams.resize);
    let io = Io { stdin, stdout, stderr, resize: sizes_from(resize) };
    let ending = tokio::select! {
        ending = command.run(backend, io) => ending,
        () = pulse.closed() => return,
        () = refuse_more(&mut session) => return,
        () = idle::expired(idle_limit, || pulse.idle()) => Ending::Failed("the session was idle for too long".into()),
    };
    let _ = error.writer.write_all(&ending.render(version)).await;
    let _ = error.writer.shutdown().await;
    session.finish().await;
}

async fn gather(session: &mut Session, streams: &mut Streams, wanted: Wanted, version: Version) -> bool {
    while !streams.complete(wanted, version) {
        match session.accept().await {
            Some(stream) => streams.place(stream),
            None => return false,
        }
    }
    true
}

/// Takes and drops further streams, so that they are reset and do not hold the session up.
async fn refuse_more(session: &mut Session) {
    while session.accept().await.is_some() {}
}

fn split(stream: Option<Stream>) -> (Option<BoxRead>, Option<BoxWrite>) {
    match stream {
        Some(stream) => (Some(Box::new(stream.reader)), Some(Box::new(stream.writer))),
        None => (None, None),
    }
}
