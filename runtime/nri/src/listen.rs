//! The socket on which plugins connect.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;

use tokio::net::UnixListener;

use crate::error::Error;

/// Binds the socket, for root alone. One that another process serves is left to it; one that nobody serves is replaced.
pub(crate) fn bind(socket: &Path) -> Result<UnixListener, Error> {
    if StdStream::connect(socket).is_ok() {
        return Err(Error::SocketTaken { path: socket.to_owned() });
    }
    let failed = |source| Error::Io { operation: "serve", path: socket.to_owned(), source };
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let partial = socket.with_extension("binding");
    let _ = fs::remove_file(&partial);
    let bound = || {
        let listener = StdListener::bind(&partial)?;
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o600))?;
        fs::rename(&partial, socket)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    bound().map_err(failed)
}
