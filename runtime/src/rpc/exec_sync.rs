//! ExecSync: runs a command to its end, with a limit on its time and its output.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use oarlock_proto::cri;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tonic::Status;

use crate::container::exec;
use crate::core::Core;
use crate::error::Error;
use crate::fdio::FdStream;

/// A process that the command left behind may hold its output open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
const CHUNK_BYTES: usize = 32 << 10;

pub(super) async fn exec_sync(
    core: &Arc<Core>,
    request: cri::ExecSyncRequest,
) -> Result<cri::ExecSyncResponse, Status> {
    let mut session = exec::begin(core, &request.container_id, &request.cmd, None, false).await?;
    let limit = core.config.exec_output_limit_bytes;
    let (stdout, stderr) = (Kept::default(), Kept::default());
    let mut readers = JoinSet::new();
    for (fd, kept) in [(session.streams.stdout.take(), &stdout), (session.streams.stderr.take(), &stderr)] {
        if let Some(fd) = fd {
            readers.spawn(keep(fd, kept.clone(), limit));
        }
    }
    let seconds = u64::try_from(request.timeout).unwrap_or(0);
    let exit_code = match seconds {
        0 => session.exit_code().await?,
        seconds => {
            let limit = Duration::from_secs(seconds);
            match tokio::time::timeout(limit, session.exit_code()).await {
                Ok(code) => code?,
                Err(_) => {
                    session.kill().await;
                    let operation =
                        format!("command {:?} in container {}", request.cmd.join(" "), request.container_id);
                    return Err(Error::TimedOut { operation, limit }.into());
                }
            }
        }
    };
    // What it wrote last is still in the pipes.
    let _ = tokio::time::timeout(DRAIN_LIMIT, async { while readers.join_next().await.is_some() {} }).await;
    let taken = |kept: &Kept| std::mem::take(&mut *kept.lock());
    Ok(cri::ExecSyncResponse { stdout: taken(&stdout), stderr: taken(&stderr), exit_code })
}

type Kept = Arc<Mutex<Vec<u8>>>;

/// Reads to the end, keeping the first `limit` bytes, so that a talkative command is never blocked.
async fn keep(fd: OwnedFd, kept: Kept, limit: usize) {
    let Ok(mut stream) = FdStream::new(fd) else { return };
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        let mut kept = kept.lock();
        let room = limit.saturating_sub(kept.len());
        kept.extend_from_slice(&chunk[..count.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn output_beyond_the_limit_is_read_and_dropped() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let kept = Kept::default();
        let write = async {
            FdStream::new(writer).unwrap().write_all(&vec![1; 300_000]).await.unwrap();
        };
        tokio::join!(keep(reader, kept.clone(), 1000), write);
        assert_eq!(kept.lock().len(), 1000);
    }
}
