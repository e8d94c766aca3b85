//! Copies a log to the client, and goes on over rotations until the container has ended.
//!
//! Rotation renames the file and lets the writer open a new one of the old name. The writer never writes to the old file
//! after the new one is there, so a reader that sees the new one reads the old one to its end and then switches.

use std::io::{self, Read, Seek, SeekFrom};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::file::LogReader;
use super::output::{LogOptions, Renderer};
use super::tail;
use crate::backend::LogFile;

/// Bytes read at a time.
const READ_BYTES: usize = 64 * 1024;

/// Copies what `options` ask for into `to`. Ends early when the client is gone.
pub(crate) async fn copy(
    mut reader: LogReader,
    log: LogFile,
    options: LogOptions,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let mut renderer = Renderer::new(&options);
    let mut running = log.running;
    // Before the first read, so that nothing written after it is missed.
    let events = match options.follow {
        true => Some(reader.watch()?),
        false => None,
    };
    if let Some(lines) = options.tail_lines {
        reader = blocking(reader, move |reader| {
            let length = reader.file.metadata()?.len();
            let start = tail::start_of_last(&reader.file, length, lines)?;
            reader.file.seek(SeekFrom::Start(start)).map(drop)
        })
        .await?
        .0;
    }
    loop {
        // Asked before reading: what was written up to the end of a container is read below.
        let ended = !*running.borrow_and_update() || running.has_changed().is_err();
        let more;
        (reader, more) = drain(reader, &mut renderer, to).await?;
        if !more {
            return Ok(());
        }
        let successor;
        (reader, successor) = blocking(reader, |reader| reader.successor()).await?;
        if let (Some(file), Some(_)) = (successor, &events) {
            // What came into the old file between the last read and the switch.
            let more;
            (reader, more) = drain(reader, &mut renderer, to).await?;
            if !more {
                return Ok(());
            }
            reader.file = file;
            renderer.new_file();
            continue;
        }
        let Some(events) = &events else { return Ok(()) };
        if ended {
            return Ok(());
        }
        tokio::select! {
            result = events.changed() => result?,
            _ = running.changed() => {}
        }
    }
}

/// Reads to the end of the file. False when nothing more is wanted.
async fn drain(
    mut reader: LogReader,
    renderer: &mut Renderer,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<(LogReader, bool)> {
    loop {
        let data;
        (reader, data) = blocking(reader, read_block).await?;
        if data.is_empty() {
            return Ok((reader, true));
        }
        let out = renderer.push(&data);
        if !out.is_empty() && to.send(Ok(out)).await.is_err() {
            return Ok((reader, false));
        }
        if renderer.is_full() {
            return Ok((reader, false));
        }
    }
}

/// The next bytes; none at the end. A file that became shorter was emptied, and is read from its start.
fn read_block(reader: &mut LogReader) -> io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(READ_BYTES);
    (&mut reader.file).take(READ_BYTES as u64).read_to_end(&mut data)?;
    if data.is_empty() && reader.file.stream_position()? > reader.file.metadata()?.len() {
        reader.file.rewind()?;
        (&mut reader.file).take(READ_BYTES as u64).read_to_end(&mut data)?;
    }
    Ok(data)
}

async fn blocking<T: Send + 'static>(
    mut reader: LogReader,
    work: impl FnOnce(&mut LogReader) -> io::Result<T> + Send + 'static,
) -> io::Result<(LogReader, T)> {
    let (reader, result) = tokio::task::spawn_blocking(move || {
        let result = work(&mut reader);
        (reader, result)
    })
    .await
    .map_err(io::Error::other)?;
    Ok((reader, result?))
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
