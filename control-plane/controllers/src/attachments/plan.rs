//! Which volumes are to be attached to a node, and which are not any more. Pure.

use k8s_openapi::api::core::v1::{Node, PersistentVolume};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use sha2::{Digest, Sha256};

use super::memory::Promises;

/// A driver's volume that a node is to have or has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Volume {
    /// Of the PersistentVolume.
    pub name: String,
    pub driver: String,
    pub handle: String,
    /// Only one node may have it.
    pub exclusive: bool,
}

impl Volume {
    /// A volume that has to be attached; None for every other.
    pub(super) fn of(volume: &PersistentVolume, driver: Option<&CSIDriver>) -> Option<Volume> {
        let spec = volume.spec.as_ref()?;
        let source = spec.csi.as_ref()?;
        if driver.is_some_and(|driver| driver.spec.attach_required == Some(false)) {
            return None;
        }
        let shared = |mode: &String| mode == "ReadWriteMany" || mode == "ReadOnlyMany";
        Some(Volume {
            name: volume.metadata.name.clone()?,
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            exclusive: !spec.access_modes.iter().flatten().any(shared),
        })
    }

    /// The name by which attachers, agents and we find the same object.
    pub(super) fn attachment(&self, node: &str) -> String {
        let digest = Sha256::digest(format!("{}{}{node}", self.handle, self.driver));
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("csi-{hex}")
    }

    /// As node status names it.
    pub(super) fn in_status(&self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver, self.handle)
    }
}

/// Whether the object was made by an attach and detach controller for a PersistentVolume.
pub(super) fn is_ours(attachment: &VolumeAttachment) -> bool {
    let name = attachment.metadata.name.as_deref().unwrap_or_default();
    let digest = name.strip_prefix("csi-").unwrap_or_default();
    digest.len() == 64 && attachment.spec.source.persistent_volume_name.is_some()
}

/// The steps for one node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub attach: Vec<Volume>,
    /// Wanted here, but another node has them.
    pub elsewhere: Vec<Volume>,
    /// Names of VolumeAttachments to delete.
    pub detach: Vec<String>,
    /// Some volume is not wanted any more, but the node still has it mounted.
    pub waits: bool,
    /// For the node's status.
    pub attached: Vec<String>,
}

/// What is known of the node.
#[derive(Debug, Clone, Copy)]
pub(super) enum Standing<'a> {
    Here(&'a Node),
    /// Nobody knows what a node has mounted that is gone.
    Missing {
        long: bool,
    },
}

impl Standing<'_> {
    fn has_mounted(self, volume: Option<&Volume>) -> bool {
        let node = match self {
            Standing::Here(node) => node,
            Standing::Missing { long } => return !long,
        };
        let in_use = node.status.as_ref().and_then(|status| status.volumes_in_use.as_deref()).unwrap_or_default();
        // What is not known may be mounted, or be about to be.
        volume.is_none_or(|volume| in_use.contains(&volume.in_status()))
    }
}

/// `present`: every attachment there is, with its volume where that is known.
pub(super) fn plan(
    node_name: &str,
    node: Standing<'_>,
    wanted: &[Volume],
    present: &[(&VolumeAttachment, Option<Volume>)],
    promises: &Promises,
) -> Plan {
    let mut plan = Plan::default();
    let here: Vec<_> = present.iter().filter(|(attachment, _)| attachment.spec.node_name == node_name).collect();
    for volume in wanted {
        let name = volume.attachment(node_name);
        if here.iter().any(|(attachment, _)| attachment.metadata.name.as_deref() == Some(&name)) {
            continue;
        }
        let same = |(attachment, of): &&(&VolumeAttachment, Option<Volume>)| {
            attachment.spec.node_name != node_name
                && of.as_ref().is_some_and(|of| (&of.driver, &of.handle) == (&volume.driver, &volume.handle))
        };
        let promise = promises.get(&(volume.driver.clone(), volume.handle.clone()));
        let promised = promise.is_some_and(|promise| promise.node != node_name);
        match volume.exclusive && (promised || present.iter().any(|other| same(&other))) {
            true => plan.elsewhere.push(volume.clone()),
            false => plan.attach.push(volume.clone()),
        }
    }
    for (attachment, volume) in here {
        let name = attachment.metadata.name.clone().unwrap_or_default();
        let keep = wanted.iter().any(|wanted| wanted.attachment(node_name) == name);
        let going = attachment.metadata.deletion_timestamp.is_some();
        if !keep && is_ours(attachment) && !going {
            match node.has_mounted(volume.as_ref()) {
                true => plan.waits = true,
                false => plan.detach.push(name),
            }
        }
        let attached = !going && attachment.status.as_ref().is_some_and(|status| status.attached);
        plan.attached.extend(volume.as_ref().filter(|_| attached).map(Volume::in_status));
    }
    plan.attached.sort();
    plan
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn volume(name: &str, exclusive: bool) -> Volume {
        Volume { name: name.into(), driver: "d.io".into(), handle: format!("disk-{name}"), exclusive }
    }

    fn attachment(volume: &Volume, node: &str, attached: bool) -> VolumeAttachment {
        serde_json::from_value(json!({"metadata": {"name": volume.attachment(node)}, "spec": {"attacher": "d.io",
            "nodeName": node, "source": {"persistentVolumeName": volume.name}}, "status": {"attached": attached}}))
        .unwrap()
    }

    const GONE: Standing<'_> = Standing::Missing { long: true };

    /// As [`super::plan`] where nothing is being made.
    fn plan(node: Standing<'_>, wanted: &[Volume], present: &[(&VolumeAttachment, Option<Volume>)]) -> Plan {
        super::plan("n1", node, wanted, present, &Promises::new())
    }

    fn node(in_use: &[String]) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "status": {"volumesInUse": in_use}})).unwrap()
    }

    #[test]
    fn what_pods_want_is_attached_and_the_rest_goes_once_it_is_not_mounted() {
        let (old, new) = (volume("old", true), volume("new", true));
        let there = attachment(&old, "n1", true);
        let present = [(&there, Some(old.clone()))];
        let mounted = node(&[old.in_status()]);
        let made = plan(Standing::Here(&mounted), std::slice::from_ref(&new), &present);
        assert_eq!((made.attach, made.detach.len(), made.waits), (vec![new.clone()], 0, true));
        assert_eq!(made.attached, ["kubernetes.io/csi/d.io^disk-old"]);
        let made = plan(Standing::Here(&node(&[])), std::slice::from_ref(&old), &present);
        assert_eq!((made.attach.len(), made.detach.len(), made.waits), (0, 0, false), "it is wanted");
        let made = plan(Standing::Here(&node(&[])), &[], &present);
        assert_eq!(made.detach, [old.attachment("n1")]);
        assert_eq!(plan(GONE, &[], &present).detach, [old.attachment("n1")], "the node is gone");
        let missing = plan(Standing::Missing { long: false }, &[], &present);
        assert!(missing.detach.is_empty() && missing.waits, "it may run on without the API");
        let unknown = plan(Standing::Here(&node(&[])), &[], &[(&there, None)]);
        assert!(unknown.detach.is_empty() && unknown.waits, "what is not known may be mounted");
        // The attacher is at it.
        let mut going = there.clone();
        going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let made = plan(Standing::Here(&mounted), std::slice::from_ref(&old), &[(&going, Some(old.clone()))]);
        assert!(made.attached.is_empty() && made.attach.is_empty(), "it is not to be relied upon: {made:?}");
        assert!(plan(GONE, &[], &[(&going, Some(old))]).detach.is_empty());
    }

    #[test]
    fn a_volume_for_one_node_waits_until_the_other_has_let_go() {
        let (own, shared) = (volume("own", true), volume("shared", false));
        let elsewhere = [attachment(&own, "n2", true), attachment(&shared, "n2", true)];
        let present = [(&elsewhere[0], Some(own.clone())), (&elsewhere[1], Some(shared.clone()))];
        let made = plan(Standing::Here(&node(&[])), &[own.clone(), shared.clone()], &present);
        assert_eq!((made.attach, made.elsewhere), (vec![shared], vec![own]));
        assert!(made.detach.is_empty() && made.attached.is_empty());
    }

    #[test]
    fn others_attachments_are_left_alone() {
        let own = volume("own", true);
        let mut foreign = attachment(&own, "n1", true);
        foreign.metadata.name = Some("by-hand".into());
        assert!(plan(GONE, &[], &[(&foreign, Some(own))]).detach.is_empty());
    }

    #[test]
    fn only_volumes_of_drivers_that_attach_are_attached() {
        let of = |spec: serde_json::Value, driver: Option<serde_json::Value>| {
            let volume = serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": spec})).unwrap();
            let driver: Option<CSIDriver> = driver.map(|spec| serde_json::from_value(json!({"spec": spec})).unwrap());
            Volume::of(&volume, driver.as_ref())
        };
        let csi = json!({"csi": {"driver": "d", "volumeHandle": "h"}, "accessModes": ["ReadWriteOnce"]});
        assert!(of(csi.clone(), None).is_some_and(|volume| volume.exclusive));
        assert!(of(csi.clone(), Some(json!({}))).is_some());
        assert_eq!(of(csi, Some(json!({"attachRequired": false}))), None);
        assert_eq!(of(json!({"hostPath": {"path": "/x"}}), None), None);
    }
}
