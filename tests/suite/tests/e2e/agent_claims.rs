//! Claims of persistent volumes, from `kubectl apply` to what a container finds in them.

use std::fs;

use super::Case;
use super::cluster::Cluster;
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("a_claim_is_bound_and_its_data_outlives_the_pod", claim),
    ("a_claim_waits_for_its_first_pod_and_stays_while_that_uses_it", first_consumer),
];

fn claim(cluster: &Cluster) {
    let disk = cluster.data_dir().join("claimed");
    fs::create_dir(&disk).expect("a directory");
    fs::write(disk.join("kept"), "before").expect("a file");
    cluster.apply(&format!(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: e2e-disk}}\nspec:\n  capacity: {{storage: 1Gi}}\n  accessModes: \
         [ReadWriteOnce]\n  hostPath: {{path: {}}}\n---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: \
         e2e-data}}\nspec: {{accessModes: [ReadWriteOnce], storageClassName: \"\", resources: {{requests: {{storage: 1Gi}}}}}}\n",
        disk.display()
    ));
    cluster.kubectl("wait --for=jsonpath={.status.phase}=Bound pvc/e2e-data --timeout=180s");
    let manifest = pod("claims", &["/bin/sleep"])
        .replace("name: main,", "name: main, volumeMounts: [{name: v, mountPath: /data}],")
        .replace("containers:", "volumes: [{name: v, persistentVolumeClaim: {claimName: e2e-data}}]\n  containers:");
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/claims --timeout=180s");
    assert_eq!(cluster.kubectl("exec claims -- cat /data/kept"), "before");
    cluster.kubectl("delete pod claims --timeout=180s");
    assert_eq!(fs::read_to_string(disk.join("kept")).expect("the file"), "before");
    cluster.kubectl("delete pvc e2e-data --timeout=180s");
    cluster.kubectl("wait --for=jsonpath={.status.phase}=Released pv/e2e-disk --timeout=180s");
    cluster.kubectl("delete pv e2e-disk --timeout=180s");
    fs::remove_dir_all(&disk).expect("removed");
}

/// A claim of the class that waits for pods.
const WAITING_CLAIM: &str = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: NAME}\nspec: {accessModes: \
    [ReadWriteOnce], storageClassName: e2e-local, resources: {requests: {storage: 1Gi}}}\n";

fn first_consumer(cluster: &Cluster) {
    let disk = cluster.data_dir().join("waited-for");
    fs::create_dir(&disk).expect("a directory");
    let node = cluster.kubectl("get nodes -o jsonpath={.items[0].metadata.name}");
    let volume = |name: &str, host: &str| {
        format!(
            "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: {name}}}\nspec:\n  capacity: {{storage: 1Gi}}\n  \
             accessModes: [ReadWriteOnce]\n  storageClassName: e2e-local\n  local: {{path: {}}}\n  nodeAffinity: {{required: \
             {{nodeSelectorTerms: [{{matchExpressions: [{{key: kubernetes.io/hostname, operator: In, values: [\"{host}\"]}}]}}]}}}}\n---\n",
            disk.display()
        )
    };
    cluster.apply(&format!(
        "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {{name: e2e-local}}\nprovisioner: \
         kubernetes.io/no-provisioner\nvolumeBindingMode: WaitForFirstConsumer\n---\n{}{}{}",
        volume("e2e-a-elsewhere", "no-such-node"),
        volume("e2e-b-here", &node),
        WAITING_CLAIM.replace("NAME", "e2e-waits")
    ));
    cluster.wait_for_output("describe pvc e2e-waits", "the wait", |text| {
        text.contains("waiting for first consumer to be created before binding")
    });
    let manifest = pod("consumer", &["/bin/sleep"])
        .replace("name: main,", "name: main, volumeMounts: [{name: v, mountPath: /data}],")
        .replace("containers:", "volumes: [{name: v, persistentVolumeClaim: {claimName: e2e-waits}}]\n  containers:");
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/consumer --timeout=180s");
    assert_eq!(cluster.kubectl("get pvc e2e-waits -o jsonpath={.spec.volumeName}"), "e2e-b-here");
    let chosen =
        cluster.get("pv e2e-b-here")["metadata"]["annotations"]["pv.kubernetes.io/bound-by-controller"].clone();
    assert_eq!(chosen, "yes");
    // Nothing is left for another claim, whose pod gets no node then.
    cluster.apply(&WAITING_CLAIM.replace("NAME", "e2e-late"));
    cluster.apply(&manifest.replace("consumer", "late").replace("e2e-waits", "e2e-late"));
    let said = cluster.wait_for_output("describe pod late", "the refusal", |text| {
        text.contains("1 node(s) didn't find available persistent volumes to bind")
    });
    assert!(said.contains("FailedScheduling"), "{said}");
    cluster.wait_for_output("describe pvc e2e-late", "the wait", |text| {
        text.contains("waiting for pod late to be scheduled")
    });
    cluster.kubectl("delete pod/late pvc/e2e-late --timeout=180s");
    cluster.kubectl("delete pvc e2e-waits --wait=false");
    assert!(cluster.kubectl("describe pvc e2e-waits").contains("Terminating"));
    cluster.kubectl("delete pod consumer --timeout=180s");
    cluster.kubectl("wait --for=delete pvc/e2e-waits --timeout=180s");
    cluster.kubectl("wait --for=jsonpath={.status.phase}=Released pv/e2e-b-here --timeout=180s");
    cluster.kubectl("delete pv e2e-a-elsewhere e2e-b-here --timeout=180s");
    cluster.kubectl("delete storageclass e2e-local");
    fs::remove_dir_all(&disk).expect("removed");
}
