//! Container logs in the CRI format: parsing, tail, filters, and following over rotations.

mod file;
mod follow;
mod line;
mod output;
mod tail;
mod watch;

pub(crate) use file::open;
pub(crate) use follow::copy;
pub(crate) use output::{LogOptions, Streams};
