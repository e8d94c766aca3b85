//! Hands container events to whoever listens. A listener that is too slow loses the oldest and is told so by the stream
//! ending; it then lists anew.

use oarlock_proto::cri::ContainerEventResponse;
use tokio::sync::broadcast;

/// Events a slow listener may be behind.
const BACKLOG_MAX: usize = 1024;

/// The source of events.
#[derive(Debug)]
pub(crate) struct Events {
    sender: broadcast::Sender<ContainerEventResponse>,
}

impl Default for Events {
    fn default() -> Events {
        Events { sender: broadcast::channel(BACKLOG_MAX).0 }
    }
}

impl Events {
    pub(crate) fn publish(&self, event: ContainerEventResponse) {
        // Nobody listening is usual.
        let _ = self.sender.send(event);
    }

    /// Whether building an event is worth the while.
    pub(crate) fn has_listeners(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
