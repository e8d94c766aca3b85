//! The addresses of this node's links, and when they change.
#![allow(unsafe_code, reason = "a descriptor is given to the runtime to wait for")]

use std::io;

use oarlock_netlink::{Address, AddressNews, Connection, Protocol};
use tokio::io::unix::AsyncFd;
use tracing::warn;

/// This node's addresses, or nothing where the kernel does not tell.
pub async fn list() -> Option<Vec<Address>> {
    let list = || Connection::open(Protocol::Route).and_then(|mut connection| connection.addresses());
    match tokio::task::spawn_blocking(list).await.ok()? {
        Ok(addresses) => Some(addresses),
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "addresses of this node cannot be listed");
            None
        }
    }
}

/// What the kernel tells of the addresses from its opening on.
pub struct Changes {
    news: AsyncFd<AddressNews>,
}

impl Changes {
    /// To be called in a runtime. Nothing, and a warning, where the kernel does not tell.
    pub fn open() -> Option<Changes> {
        let opened = AddressNews::open().map_err(io::Error::other).and_then(|news| {
            // SAFETY: the news own their socket, which keeps its number and stays open for as long as they live.
            Ok(unsafe { AsyncFd::register(news) }?)
        });
        let warn = |error: &io::Error| {
            warn!(error = error as &dyn std::error::Error, "changes of this node's addresses are not heard of");
        };
        opened.inspect_err(warn).ok().map(|news| Changes { news })
    }

    /// Waits for the next; says no when nothing more is heard. Cancel safe: what was not taken is told again.
    pub async fn next(&self) -> bool {
        loop {
            let Ok(mut ready) = self.news.readable().await else { return false };
            let taken = self.news.get_ref().take();
            ready.clear_ready();
            match taken {
                Ok(false) => {}
                Ok(true) => return true,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, "changes of this node's addresses are not heard of any more");
                    return false;
                }
            }
        }
    }
}
