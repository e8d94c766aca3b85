//! Send windows.
//!
//! The SPDY library of the Go clients neither sends nor minds WINDOW_UPDATE; for such a peer the connection's own flow
//! control is all there is. A window therefore counts from the start but holds back only once the peer has updated it.

use std::io;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

const INITIAL_BYTES: i64 = 64 * 1024;
/// A peer that credits more than this is not believed.
const CREDIT_LIMIT: i64 = i32::MAX as i64;

/// How much may be sent.
#[derive(Debug)]
pub(crate) struct Window {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    credit: i64,
    limited: bool,
    closed: bool,
    waiting: Vec<Waker>,
}

impl Window {
    pub fn new() -> Self {
        Self { state: Mutex::new(State { credit: INITIAL_BYTES, limited: false, closed: false, waiting: Vec::new() }) }
    }

    /// Takes up to `want` bytes of credit, at least one.
    pub fn poll_take(&self, context: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        let mut state = self.state.lock();
        if state.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let granted = if state.limited { (want as i64).min(state.credit) } else { want as i64 };
        if granted <= 0 {
            if !state.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                state.waiting.push(context.waker().clone());
            }
            return Poll::Pending;
        }
        state.credit -= granted;
        Poll::Ready(Ok(granted as usize))
    }

    /// Returns credit that was taken and not used.
    pub fn give_back(&self, bytes: usize) {
        self.state.lock().credit += bytes as i64;
    }

    /// The peer's update.
    pub fn update(&self, delta: u32) {
        let mut state = self.state.lock();
        state.limited = true;
        state.credit = (state.credit + i64::from(delta)).min(CREDIT_LIMIT);
        wake(&mut state);
    }

    /// Nothing more may be sent.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        wake(&mut state);
    }
}

fn wake(state: &mut State) {
    for waker in state.waiting.drain(..) {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn a_peer_without_updates_is_not_waited_for() {
        let window = Window::new();
        for _ in 0..10 {
            assert_eq!(poll_fn(|context| window.poll_take(context, 60_000)).await.unwrap(), 60_000);
        }
    }

    #[tokio::test]
    async fn a_peer_with_updates_is() {
        let window = Window::new();
        window.update(10);
        let total = poll_fn(|context| window.poll_take(context, 1_000_000)).await.unwrap();
        assert_eq!(total, 64 * 1024 + 10);
        let mut context = Context::from_waker(Waker::noop());
        assert!(window.poll_take(&mut context, 1).is_pending());
        window.update(5);
        assert!(matches!(window.poll_take(&mut context, 9), Poll::Ready(Ok(5))));
        window.close();
        assert!(matches!(window.poll_take(&mut context, 9), Poll::Ready(Err(_))));
    }
}
