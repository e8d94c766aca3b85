//! Sets up logging for a process: one line an event on standard error, or JSON, filtered by `OARLOCK_LOG`.
//!
//! Owns the subscriber and nothing else; what is worth logging is decided where it happens.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people: time, level, message, fields.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// A filter that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the log filter {filter:?}")]
pub struct FilterError {
    filter: String,
    #[source]
    source: tracing_subscriber::filter::ParseError,
}

/// Installs the process-wide subscriber. `filter` is in `tracing`'s directive syntax (`info,oarlock_agent=debug`); the
/// environment variable `OARLOCK_LOG` wins over it. A second call in one process changes nothing.
pub fn init(filter: &str, format: Format) -> Result<(), FilterError> {
    let filter = std::env::var("OARLOCK_LOG").unwrap_or_else(|_| filter.to_owned());
    let parsed = EnvFilter::try_new(&filter).map_err(|source| FilterError { filter, source })?;
    // Spans are below the levels of daily use; who asks for them wants to know how long each step took.
    let spans = if parsed.max_level_hint() >= Some(LevelFilter::DEBUG) { FmtSpan::CLOSE } else { FmtSpan::NONE };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_span_events(spans)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // Failure means that a subscriber is there already, which is what the caller wants.
    let _ = match format {
        Format::Text => builder.try_init(),
        Format::Json => builder.json().try_init(),
    };
    Ok(())
}
