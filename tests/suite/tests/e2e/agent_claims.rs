//! Claims of persistent volumes, from `kubectl apply` to what a container finds in them.

use std::fs;

use super::Case;
use super::cluster::Cluster;
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[("a_claim_is_bound_and_its_data_outlives_the_pod", claim)];

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
    cluster.kubectl("wait --for=jsonpath={.status.phase}=Bound pvc/e2e-data --timeout=60s");
    let manifest = pod("claims", &["/bin/sleep"])
        .replace("name: main,", "name: main, volumeMounts: [{name: v, mountPath: /data}],")
        .replace("containers:", "volumes: [{name: v, persistentVolumeClaim: {claimName: e2e-data}}]\n  containers:");
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/claims --timeout=60s");
    assert_eq!(cluster.kubectl("exec claims -- cat /data/kept"), "before");
    cluster.kubectl("delete pod claims --timeout=60s");
    assert_eq!(fs::read_to_string(disk.join("kept")).expect("the file"), "before");
    cluster.kubectl("delete pvc e2e-data --timeout=60s");
    cluster.kubectl("wait --for=jsonpath={.status.phase}=Released pv/e2e-disk --timeout=60s");
    cluster.kubectl("delete pv e2e-disk --timeout=60s");
    fs::remove_dir_all(&disk).expect("removed");
}
