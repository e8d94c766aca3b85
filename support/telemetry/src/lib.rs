//! Sets up logging for a process: one line an event on standard error, or JSON, filtered by `OARLOCK_LOG`; and spans for a
//! collector of traces, where one is configured.
//!
//! Owns the subscriber and nothing else; what is worth logging is decided where it happens.

mod export;
mod otlp;

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

pub use export::{Export, ExportError, Exported, exported};
use export::{Exporter, Flush};

static FLUSH: OnceLock<Flush> = OnceLock::new();

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people: time, level, message, fields.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// What cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A filter that could not be read.
    #[error("cannot read the log filter {filter:?}")]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error(transparent)]
    Export(#[from] ExportError),
}

/// Installs the process-wide subscriber. `filter` is in `tracing`'s directive syntax (`info,oarlock_agent=debug`); the
/// environment variable `OARLOCK_LOG` wins over it. A second call in one process changes nothing.
pub fn init(filter: &str, format: Format) -> Result<(), InitError> {
    init_with(filter, format, None)
}

/// As [`init`], with spans sent to a collector.
pub fn init_with(filter: &str, format: Format, export: Option<&Export>) -> Result<(), InitError> {
    let filter = std::env::var("OARLOCK_LOG").unwrap_or_else(|_| filter.to_owned());
    let parsed = EnvFilter::try_new(&filter).map_err(|source| InitError::Filter { filter, source })?;
    // Spans are below the levels of daily use; who asks for them wants to know how long each step took.
    let spans = if parsed.max_level_hint() >= Some(LevelFilter::DEBUG) { FmtSpan::CLOSE } else { FmtSpan::NONE };
    let exporter = match export {
        None => None,
        Some(export) => {
            let (exporter, flush) = Exporter::start(export)?;
            let _ = FLUSH.set(flush);
            Some(exporter.with_filter(filter_fn(Exporter::wants)))
        }
    };
    let lines =
        fmt::layer().with_span_events(spans).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        Format::Text => lines.with_filter(parsed).boxed(),
        Format::Json => lines.json().with_filter(parsed).boxed(),
    };
    // Failure means that a subscriber is there already, which is what the caller wants.
    let _ = tracing_subscriber::registry().with(lines).with(exporter).try_init();
    Ok(())
}

/// Waits, for no longer than `limit`, until spans that have ended are with the collector.
pub fn flush(limit: Duration) {
    if let Some(flush) = FLUSH.get() {
        flush.wait(limit);
    }
}
