//! Images from a registry: Debian's docker-registry on loopback, filled by skopeo.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use oarlock_testimage::{Image, pack};
use oarlock_testkit::{binary, wait_for};

use super::Case;
use super::cluster::{Cluster, PATIENCE, text};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[("a_pod_pulls_its_image_from_a_registry", pull)];

/// A registry that ends with its owner.
struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    fn start(directory: &Path) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind").local_addr().expect("address");
        let address = format!("127.0.0.1:{}", free.port());
        let configuration = directory.join("registry.yml");
        let contents = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            directory.join("blobs").display()
        );
        std::fs::write(&configuration, contents).expect("write");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry");
        let registry = Self { process, address };
        wait_for("the registry", PATIENCE, || std::net::TcpStream::connect(&registry.address).ok());
        registry
    }

    /// Puts an OCI archive there as `name`; returns its reference.
    fn push(&self, archive: &Path, name: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("oci-archive:{}", archive.display()))
            .arg(format!("docker://{reference}"))
            .output()
            .expect("skopeo");
        assert!(output.status.success(), "skopeo: {}", text(&output.stderr));
        reference
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pull(cluster: &Cluster) {
    let directory = tempfile::tempdir().expect("tempdir");
    let registry = Registry::start(directory.path());
    // An image of its own: runtimes remove an image with all its names.
    let archive = directory.path().join("rower.tar");
    let image = Image { files: &[("rower", b"1", 0o644)], ..Image::default() };
    pack(&binary("oarlock-testimage"), &image, &archive).expect("pack an image");
    let reference = registry.push(&archive, "harbour/rower:1");
    let manifest = pod("pulled", &["/bin/sleep"])
        .replace("\"oarlock.local/testimage:1\",", &format!("\"{reference}\", imagePullPolicy: Always,"));
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/pulled --timeout=180s");
    let described = cluster.kubectl("describe pod pulled");
    assert!(described.contains(&format!("Successfully pulled image \"{reference}\"")), "{described}");
    let image_id = cluster.get("pod pulled")["status"]["containerStatuses"][0]["imageID"].to_string();
    assert!(image_id.contains("sha256:"), "{image_id}");
    cluster.kubectl("delete pod pulled --timeout=180s");
    let absent = cluster.oarlock(&["images", "pull", &format!("{}/harbour/rower:2", registry.address)]);
    let said = text(&absent.stderr);
    assert!(!absent.status.success() && said.contains("harbour/rower:2") && said.contains("not found"), "{said}");
    let removed = cluster.oarlock(&["images", "rm", &reference]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
}
