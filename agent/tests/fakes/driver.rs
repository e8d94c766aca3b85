//! A CSI driver in a process of its own: this test program, started again to be nothing else.
//!
//! A volume is a directory with one file in it, which says what the driver was told. Every call is a line on its output; a line
//! `fail publish` or `mend` on its input makes it fail and work again.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use oarlock_plugins::socket;
use oarlock_proto::csi;
use oarlock_proto::csi::node_server::{Node, NodeServer};
use oarlock_proto::csi::node_service_capability::{Rpc, Type as Capability, rpc::Type as Ability};
use oarlock_proto::pluginregistration as registration;
use oarlock_proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::plugin::{ROLE, tell};

pub const DRIVER: &str = "disks.example.com";

#[derive(Clone)]
struct Driver {
    endpoint: PathBuf,
    failing: Arc<Mutex<HashSet<String>>>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Driver {
    fn called(&self, call: &str, detail: &str) -> Result<(), Status> {
        tell(&format!("{call} {detail}"));
        match self.failing.lock().unwrap().contains(call) {
            true => Err(Status::unavailable("the disk is asleep")),
            false => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl Registration for Driver {
    async fn get_info(&self, _: Request<registration::InfoRequest>) -> Answer<registration::PluginInfo> {
        Ok(Response::new(registration::PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<registration::RegistrationStatus>,
    ) -> Answer<registration::RegistrationStatusResponse> {
        let status = status.into_inner();
        tell(&format!("registered {} {}", status.plugin_registered, status.error));
        Ok(Response::new(registration::RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Answer<csi::NodeStageVolumeResponse> {
        let request = request.into_inner();
        self.called("stage", &format!("{} {}", request.volume_id, request.secrets.len()))?;
        std::fs::write(Path::new(&request.staging_target_path).join("staged"), "").map_err(broken)?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Answer<csi::NodeUnstageVolumeResponse> {
        let request = request.into_inner();
        self.called("unstage", &request.volume_id)?;
        let _ = std::fs::remove_file(Path::new(&request.staging_target_path).join("staged"));
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Answer<csi::NodePublishVolumeResponse> {
        let request = request.into_inner();
        self.called("publish", &request.volume_id)?;
        let target = Path::new(&request.target_path);
        let capability = request.volume_capability.clone().unwrap_or_default();
        if matches!(capability.access_type, Some(csi::volume_capability::AccessType::Block(_))) {
            // Stands for the device; the directory above it has to be there.
            std::fs::write(target, "").map_err(broken)?;
            return Ok(Response::new(csi::NodePublishVolumeResponse {}));
        }
        std::fs::create_dir_all(target).map_err(broken)?;
        let mut context: Vec<_> = request.volume_context.iter().map(|(k, v)| format!("{k}={v}")).collect();
        context.sort();
        let attached = request.publish_context.get("device").cloned().unwrap_or_default();
        let said = format!("device={attached} readonly={} {}", request.readonly, context.join(" "));
        std::fs::write(target.join("told"), said).map_err(broken)?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let request = request.into_inner();
        self.called("unpublish", &request.volume_id)?;
        let target = Path::new(&request.target_path);
        let _ = if target.is_file() { std::fs::remove_file(target) } else { std::fs::remove_dir_all(target) };
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        _: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Answer<csi::NodeGetVolumeStatsResponse> {
        let unit = csi::volume_usage::Unit::Bytes as i32;
        let usage = vec![csi::VolumeUsage { available: 60, total: 100, used: 40, unit }];
        Ok(Response::new(csi::NodeGetVolumeStatsResponse { usage, volume_condition: None }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Answer<csi::NodeExpandVolumeResponse> {
        let request = request.into_inner();
        let bytes = request.capacity_range.map_or(0, |range| range.required_bytes);
        self.called("expand", &format!("{} {bytes}", request.volume_id))?;
        Ok(Response::new(csi::NodeExpandVolumeResponse { capacity_bytes: bytes }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        let abilities = [Ability::StageUnstageVolume, Ability::GetVolumeStats, Ability::ExpandVolume];
        let capability = |ability: Ability| csi::NodeServiceCapability {
            r#type: Some(Capability::Rpc(Rpc { r#type: ability as i32 })),
        };
        let capabilities = abilities.into_iter().map(capability).collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Answer<csi::NodeGetInfoResponse> {
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: "rack-7".to_owned(),
            max_volumes_per_node: 16,
            accessible_topology: Some(csi::Topology {
                segments: [("disks.example.com/rack".to_owned(), "7".to_owned())].into(),
            }),
        }))
    }
}

fn broken(error: std::io::Error) -> Status {
    Status::internal(error.to_string())
}

/// In the driver's process: serves until killed. Elsewhere: returns.
pub async fn be_driver() {
    let Some(kubelet) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let endpoint = kubelet.join("plugins").join(DRIVER).join("csi.sock");
    let driver = Driver { endpoint: endpoint.clone(), failing: Arc::default() };
    let listen = |path: &Path| socket::listen(path).expect("a socket");
    tokio::spawn(socket::serve(listen(&endpoint), NodeServer::new(driver.clone()), CancellationToken::new()));
    let reg = kubelet.join("plugins_registry").join(format!("{DRIVER}-reg.sock"));
    tokio::spawn(socket::serve(listen(&reg), RegistrationServer::new(driver.clone()), CancellationToken::new()));
    tell("serving");
    let orders = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let mut failing = driver.failing.lock().unwrap();
            match line.strip_prefix("fail ") {
                Some(call) => drop(failing.insert(call.to_owned())),
                None => failing.clear(),
            }
            tell("understood");
        }
    });
    let _ = orders.await;
}
