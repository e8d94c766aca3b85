//! ImageFsInfo: images and writable layers share one file system.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::state::{blocking, now_nanos};

pub(super) async fn image_fs_info(core: &Arc<Core>) -> Result<cri::ImageFsInfoResponse, Status> {
    let measured = core.clone();
    let (images, containers) = blocking("the image file system", move || {
        let images = measured.images.usage();
        let layers = measured.images.rootfs_keys().iter().fold((0, 0), |(bytes, inodes), key| {
            let usage = measured.images.rootfs_usage(key);
            (bytes + usage.bytes, inodes + usage.inodes)
        });
        Ok::<_, Error>(((images.bytes, images.inodes), layers))
    })
    .await?;
    let usage = |(bytes, inodes): (u64, u64)| cri::FilesystemUsage {
        timestamp: now_nanos(),
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: core.images.root().to_string_lossy().into_owned() }),
        used_bytes: Some(cri::UInt64Value { value: bytes }),
        inodes_used: Some(cri::UInt64Value { value: inodes }),
    };
    Ok(cri::ImageFsInfoResponse {
        image_filesystems: vec![usage(images)],
        container_filesystems: vec![usage(containers)],
    })
}
