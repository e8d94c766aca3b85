//! [`Driver`]: the calls to one CSI driver's node service, each with its limit.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use oarlock_plugins::socket;
use oarlock_proto::csi;
use oarlock_proto::csi::node_client::NodeClient;
use tonic::transport::Channel;

use crate::error::CsiError;

const CALL: Duration = Duration::from_secs(15);
/// Calls that may format, mount or move data.
const SLOW_CALL: Duration = Duration::from_secs(110);

/// What a driver can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Abilities(BTreeSet<i32>);

pub(crate) use csi::node_service_capability::rpc::Type as Ability;

impl Abilities {
    pub(crate) fn can(&self, ability: Ability) -> bool {
        self.0.contains(&(ability as i32))
    }
}

#[cfg(test)]
impl FromIterator<Ability> for Abilities {
    fn from_iter<I: IntoIterator<Item = Ability>>(abilities: I) -> Self {
        Self(abilities.into_iter().map(|ability| ability as i32).collect())
    }
}

/// A driver behind its socket.
#[derive(Clone)]
pub(crate) struct Driver {
    node: NodeClient<Channel>,
}

async fn bounded<T>(
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, CsiError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CsiError::Status { status: Box::new(status) }),
        Err(_) => Err(CsiError::Timeout { call, seconds: limit.as_secs() }),
    }
}

impl Driver {
    pub(crate) fn new(endpoint: &Path) -> Self {
        Self { node: NodeClient::new(socket::channel(endpoint)) }
    }

    pub(crate) async fn info(&self) -> Result<csi::NodeGetInfoResponse, CsiError> {
        bounded("NodeGetInfo", CALL, self.node.clone().node_get_info(csi::NodeGetInfoRequest {})).await
    }

    pub(crate) async fn abilities(&self) -> Result<Abilities, CsiError> {
        let request = csi::NodeGetCapabilitiesRequest {};
        let answer = bounded("NodeGetCapabilities", CALL, self.node.clone().node_get_capabilities(request)).await?;
        let kinds = answer.capabilities.into_iter().filter_map(|capability| capability.r#type);
        Ok(Abilities(kinds.map(|csi::node_service_capability::Type::Rpc(rpc)| rpc.r#type).collect()))
    }

    pub(crate) async fn stage(&self, request: csi::NodeStageVolumeRequest) -> Result<(), CsiError> {
        bounded("NodeStageVolume", SLOW_CALL, self.node.clone().node_stage_volume(request)).await.map(drop)
    }

    pub(crate) async fn unstage(&self, volume_id: &str, staging: &Path) -> Result<(), CsiError> {
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: volume_id.to_owned(), staging_target_path: text(staging) };
        bounded("NodeUnstageVolume", SLOW_CALL, self.node.clone().node_unstage_volume(request)).await.map(drop)
    }

    pub(crate) async fn publish(&self, request: csi::NodePublishVolumeRequest) -> Result<(), CsiError> {
        bounded("NodePublishVolume", SLOW_CALL, self.node.clone().node_publish_volume(request)).await.map(drop)
    }

    pub(crate) async fn unpublish(&self, volume_id: &str, target: &Path) -> Result<(), CsiError> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: volume_id.to_owned(), target_path: text(target) };
        bounded("NodeUnpublishVolume", SLOW_CALL, self.node.clone().node_unpublish_volume(request)).await.map(drop)
    }

    pub(crate) async fn expand(&self, request: csi::NodeExpandVolumeRequest) -> Result<i64, CsiError> {
        let answer = bounded("NodeExpandVolume", SLOW_CALL, self.node.clone().node_expand_volume(request)).await?;
        Ok(answer.capacity_bytes)
    }

    pub(crate) async fn stats(
        &self,
        volume_id: &str,
        path: &Path,
    ) -> Result<csi::NodeGetVolumeStatsResponse, CsiError> {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: volume_id.to_owned(),
            volume_path: text(path),
            staging_target_path: String::new(),
        };
        bounded("NodeGetVolumeStats", CALL, self.node.clone().node_get_volume_stats(request)).await
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
