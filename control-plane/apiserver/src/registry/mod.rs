//! The generic registry: get, list, watch, create, update, patch and delete over the rows of the table of kinds.

mod create;
mod delete;
mod patch;
mod read;
mod respond;
mod update;
mod watch;

pub(crate) use create::create;
pub(crate) use delete::{DeleteOptions, delete, delete_collection, delete_object};
pub(crate) use patch::{Patch, patch};
pub(crate) use read::{get, list, select};
pub(crate) use respond::spelled;
pub(crate) use update::{Change, Mode, Written, modify, update, written_answer};
pub(crate) use watch::watch;
