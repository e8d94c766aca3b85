//! GetContainerEvents: a stream that ends when the daemon stops, or when its reader is too slow.

use std::sync::Arc;

use futures::StreamExt;
use oarlock_proto::cri;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Status;

use super::Responses;
use crate::core::Core;

pub(super) fn get_container_events(core: &Arc<Core>) -> Responses<cri::ContainerEventResponse> {
    let events = BroadcastStream::new(core.events.subscribe());
    let events = events.map(|event| {
        event.map_err(|_| {
            Status::data_loss("the reader was too slow and missed events: list containers and listen again")
        })
    });
    Box::pin(events.take_until(core.shutdown.clone().cancelled_owned()))
}
