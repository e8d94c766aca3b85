//! [`PluginClient`]: the calls to one device plugin, each with its limit.

use std::path::Path;
use std::time::Duration;

use oarlock_allocation::devices::Ids;
use oarlock_proto::deviceplugin as wire;
use oarlock_proto::deviceplugin::device_plugin_client::DevicePluginClient;
use tonic::transport::Channel;

use crate::socket;

const CALL: Duration = Duration::from_secs(10);
/// Plugins may set hardware up in these.
const SLOW_CALL: Duration = Duration::from_secs(30);
/// Lists of many devices.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A call to a device plugin that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    #[error("{}", socket::shown(.status))]
    Status { status: Box<tonic::Status> },
    #[error("rpc error: code = DeadlineExceeded desc = {call} took longer than {} s", .after.as_secs())]
    Timeout { call: &'static str, after: Duration },
    #[error("no plugin serves {resource} now")]
    NotThere { resource: String },
    #[error("no containers in return allocation response")]
    Empty,
}

/// A device plugin behind its socket.
#[derive(Clone)]
pub(crate) struct PluginClient {
    client: DevicePluginClient<Channel>,
}

async fn bounded<T>(
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, PluginError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(PluginError::Status { status: Box::new(status) }),
        Err(_) => Err(PluginError::Timeout { call, after: limit }),
    }
}

impl PluginClient {
    pub(crate) fn new(path: &Path) -> Self {
        let client = DevicePluginClient::new(socket::channel(path)).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Self { client }
    }

    pub(crate) async fn options(&self) -> Result<wire::DevicePluginOptions, PluginError> {
        let mut client = self.client.clone();
        bounded("GetDevicePluginOptions", CALL, client.get_device_plugin_options(wire::Empty {})).await
    }

    /// The stream of lists of devices; its end is the plugin's.
    pub(crate) async fn watch(&self) -> Result<tonic::Streaming<wire::ListAndWatchResponse>, PluginError> {
        bounded("ListAndWatch", CALL, self.client.clone().list_and_watch(wire::Empty {})).await
    }

    pub(crate) async fn preferred(&self, among: &Ids, must: &Ids, count: usize) -> Result<Ids, PluginError> {
        let container = wire::ContainerPreferredAllocationRequest {
            available_device_i_ds: among.iter().cloned().collect(),
            must_include_device_i_ds: must.iter().cloned().collect(),
            allocation_size: i32::try_from(count).unwrap_or(i32::MAX),
        };
        let request = wire::PreferredAllocationRequest { container_requests: vec![container] };
        let mut client = self.client.clone();
        let answer = bounded("GetPreferredAllocation", CALL, client.get_preferred_allocation(request)).await?;
        Ok(answer.container_responses.into_iter().flat_map(|one| one.device_i_ds).collect())
    }

    pub(crate) async fn allocate(&self, ids: &Ids) -> Result<wire::ContainerAllocateResponse, PluginError> {
        let container = wire::ContainerAllocateRequest { devices_ids: ids.iter().cloned().collect() };
        let request = wire::AllocateRequest { container_requests: vec![container] };
        let answer = bounded("Allocate", SLOW_CALL, self.client.clone().allocate(request)).await?;
        answer.container_responses.into_iter().next().ok_or(PluginError::Empty)
    }

    pub(crate) async fn pre_start(&self, ids: &Ids) -> Result<(), PluginError> {
        let request = wire::PreStartContainerRequest { devices_ids: ids.iter().cloned().collect() };
        bounded("PreStartContainer", SLOW_CALL, self.client.clone().pre_start_container(request)).await.map(drop)
    }
}
