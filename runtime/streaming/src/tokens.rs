//! One-time tokens: what a URL stands for until it is picked up.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::time::Instant;

use crate::backend::StreamError;

/// Requests waiting to be picked up.
const WAITING_LIMIT: usize = 1000;
/// How long a URL is good.
const LIFE: Duration = Duration::from_secs(60);

/// Requests by token.
pub(crate) struct TokenTable<T> {
    waiting: Mutex<HashMap<String, (Instant, T)>>,
}

impl<T> TokenTable<T> {
    pub fn new() -> Self {
        Self { waiting: Mutex::default() }
    }

    /// Keeps a request; gives its token.
    pub fn put(&self, request: T) -> Result<String, StreamError> {
        let mut bytes = [0u8; 16];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| StreamError::failed(format!("no random bytes: {error}")))?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut waiting = self.waiting.lock();
        waiting.retain(|_, (made, _)| made.elapsed() < LIFE);
        if waiting.len() >= WAITING_LIMIT {
            return Err(StreamError::TooManyRequests);
        }
        waiting.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// Takes a request; its token is good no longer.
    pub fn take(&self, token: &str) -> Option<T> {
        let (made, request) = self.waiting.lock().remove(token)?;
        (made.elapsed() < LIFE).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tokens_are_good_once_and_for_a_minute() {
        let table = TokenTable::new();
        let token = table.put(1).unwrap();
        assert_eq!(token.len(), 32);
        assert_eq!(table.take(&token), Some(1));
        assert_eq!(table.take(&token), None);
        let token = table.put(2).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(table.take(&token), None);
    }

    #[tokio::test(start_paused = true)]
    async fn their_number_is_bounded_and_old_ones_make_room() {
        let table = TokenTable::new();
        for number in 0..WAITING_LIMIT {
            table.put(number).unwrap();
        }
        assert!(matches!(table.put(0), Err(StreamError::TooManyRequests)));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(table.put(0).is_ok());
    }
}
