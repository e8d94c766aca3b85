//! Cuts a runtime's whole state into messages that are no longer than the protocol allows. Pure.

use prost::Message as _;

use crate::api::{Container, PodSandbox, SynchronizeRequest};
use crate::ttrpc;

/// What the envelope and the flags may take of a message.
const ENVELOPE_BYTES: usize = 4096;
/// What precedes each item in a message.
const ITEM_BYTES: usize = 8;

/// The messages, all but the last of which say that more is to come.
pub(crate) fn cut(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    cut_at(pods, containers, ttrpc::DATA_BYTES_MAX - ENVELOPE_BYTES)
}

fn cut_at(pods: Vec<PodSandbox>, containers: Vec<Container>, bytes_max: usize) -> Vec<SynchronizeRequest> {
    let mut messages = vec![SynchronizeRequest::default()];
    let mut bytes = 0;
    let mut room = |messages: &mut Vec<SynchronizeRequest>, length: usize| {
        if bytes > 0 && bytes + length + ITEM_BYTES > bytes_max {
            if let Some(last) = messages.last_mut() {
                last.more = true;
            }
            messages.push(SynchronizeRequest::default());
            bytes = 0;
        }
        bytes += length + ITEM_BYTES;
    };
    for pod in pods {
        room(&mut messages, pod.encoded_len());
        if let Some(last) = messages.last_mut() {
            last.pods.push(pod);
        }
    }
    for container in containers {
        room(&mut messages, container.encoded_len());
        if let Some(last) = messages.last_mut() {
            last.containers.push(container);
        }
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_told_once_and_no_message_is_too_long() {
        let pod = |number: usize| PodSandbox { id: format!("pod-{number:04}"), ..PodSandbox::default() };
        let container = |number: usize| Container { id: format!("container-{number:04}"), ..Container::default() };
        let messages = cut_at((0..100).map(pod).collect(), (0..100).map(container).collect(), 300);
        assert!(messages.len() > 5);
        assert!(messages.iter().all(|message| message.encoded_len() <= 300));
        assert_eq!(messages.iter().map(|message| message.pods.len()).sum::<usize>(), 100);
        assert_eq!(messages.iter().map(|message| message.containers.len()).sum::<usize>(), 100);
        let (last, others) = messages.split_last().unwrap();
        assert!(!last.more && others.iter().all(|message| message.more));
    }

    #[test]
    fn nothing_is_told_in_one_message_too() {
        assert_eq!(cut(Vec::new(), Vec::new()), [SynchronizeRequest::default()]);
    }
}
