//! Pulls from registries that ask for credentials, break off, or compress otherwise: one made here, and Debian's
//! docker-registry. Needs root (owners of files), docker-registry and skopeo.

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod image_files;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use image_files::{Built, Protection, Registry, build, dir, file, noise, tar, write_layout};
use oarlock_images::{Auth, ImageError, ImageStore, MirrorRule, RegistryConfig};
use oarlock_testkit::{require_root, wait_for};

/// `oar:lock` in base64, and as a line of an htpasswd file.
const PAPERS: &str = "b2FyOmxvY2s=";
const HTPASSWD: &str = "oar:$2b$05$7qoaYboPTrFwMpFZnlTJXugKh7NFfJ3ovrQSADyBzo2SnXM9lZMxG\n";

async fn store(directory: &Path, registries: RegistryConfig) -> ImageStore {
    require_root();
    ImageStore::open(directory, registries).await.unwrap()
}

/// One layer that does not get smaller by compression.
fn large() -> Built {
    build(&[tar(&[dir("etc"), file("etc/noise", &noise(1, 1 << 20))])])
}

#[tokio::test]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let built = large();
    let layer = &built.layer_digests[0];
    let registry = Registry::start(&built).await;
    registry.serve_ranges();
    for _ in 0..4 {
        registry.break_once(layer);
    }
    let store = store(temp.path(), RegistryConfig::default()).await;
    let image = store.pull(&format!("{}/test/app:v1", registry.address), None).await.unwrap();
    assert_eq!(image.id, built.config_digest);
    assert_eq!(registry.requests_for(layer), 5);
    // Each byte once, and the configuration.
    let whole = built.blobs[layer].len() + built.blobs[&built.config_digest].len();
    assert_eq!(registry.bytes_sent(), whole);

    // One that never gets anywhere is given up, and nothing stays of it.
    store.remove(&image.id).await.unwrap();
    for _ in 0..200 {
        registry.break_once(layer);
    }
    registry.replace_blob(layer, b"x");
    store.pull(&format!("{}/test/app:v1", registry.address), None).await.unwrap_err();
    assert!(store.list().is_empty());
    assert_eq!(fs::read_dir(temp.path().join("scratch")).unwrap().count(), 0);
}

#[tokio::test]
async fn credentials_are_shown_to_who_asks_for_them_and_wrong_ones_are_told() {
    let built = large();
    let registry = Registry::start(&built).await;
    let reference = format!("{}/test/app:v1", registry.address);
    let good = || Some(Auth::Basic { username: "oar".into(), password: "lock".into() });
    let bad = || Some(Auth::Basic { username: "oar".into(), password: "wrong".into() });
    for protection in [Protection::Basic(PAPERS.into()), Protection::Token(PAPERS.into())] {
        registry.protect(protection);
        let temp = tempfile::tempdir().unwrap();
        let plain = store(temp.path(), RegistryConfig::default()).await;
        for auth in [None, bad()] {
            let error = plain.pull(&reference, auth).await.unwrap_err();
            assert!(matches!(error, ImageError::Denied { .. }), "{error:?}");
            assert!(!error.to_string().contains("wrong"), "{error}");
        }
        plain.pull(&reference, good()).await.unwrap();

        // From a file, which may come later; also for a mirror.
        let temp = tempfile::tempdir().unwrap();
        let credentials = temp.path().join("config.json");
        let registries = RegistryConfig {
            credentials: Some(credentials.clone()),
            mirrors: vec![MirrorRule {
                registry: "mirrored.example".into(),
                endpoints: vec![format!("http://{}", registry.address)],
            }],
            ..RegistryConfig::default()
        };
        let with_file = store(&temp.path().join("store"), registries).await;
        with_file.pull(&reference, None).await.unwrap_err();
        let content = format!(r#"{{"auths": {{"{}": {{"auth": "{PAPERS}"}}}}}}"#, registry.address);
        fs::write(&credentials, content).unwrap();
        with_file.pull(&reference, None).await.unwrap();
        let mirrored = with_file.pull("mirrored.example/test/app:v1", None).await.unwrap();
        assert_eq!(mirrored.id, built.config_digest);
    }
    registry.protect(Protection::None);
}

/// Debian's registry, which ends with its owner.
struct DockerRegistry {
    process: Child,
    address: String,
}

impl DockerRegistry {
    fn start(directory: &Path) -> DockerRegistry {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        fs::write(directory.join("htpasswd"), HTPASSWD).unwrap();
        let configuration = directory.join("registry.yml");
        let content = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {0}/blobs}}}}\nhttp: {{addr: {address}}}\n\
             auth: {{htpasswd: {{realm: here, path: {0}/htpasswd}}}}\n",
            directory.display()
        );
        fs::write(&configuration, content).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&configuration).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry of the distribution");
        let registry = DockerRegistry { process, address };
        wait_for("the registry", Duration::from_secs(30), || std::net::TcpStream::connect(&registry.address).ok());
        registry
    }

    fn push(&self, layout: &Path, name: &str, compression: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", "--dest-creds=oar:lock"])
            .args(["--dest-compress-format", compression])
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{reference}"))
            .output()
            .expect("skopeo of the distribution");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        reference
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_real_registry_gives_gzip_and_zstd_layers_for_the_right_password() {
    let temp = tempfile::tempdir().unwrap();
    let registry = DockerRegistry::start(temp.path());
    let auth = || Some(Auth::Basic { username: "oar".into(), password: "lock".into() });
    for (compression, letter) in [("gzip", b'g'), ("zstd", b'z')] {
        // Each its own: what the registry has already is not sent again, however it is compressed.
        let built = image_files::build_uncompressed(&[tar(&[dir("etc"), file("etc/a", &[letter; 100_000])])]);
        let layout = temp.path().join(format!("layout-{compression}"));
        write_layout(&built, "rower:1", &layout);
        let reference = registry.push(&layout, &format!("harbour/rower:{compression}"), compression);
        let store = store(&temp.path().join(compression), RegistryConfig::default()).await;
        assert!(matches!(store.pull(&reference, None).await.unwrap_err(), ImageError::Denied { .. }));
        let image = store.pull(&reference, auth()).await.unwrap();
        let rootfs = store.prepare_rootfs(&image.id, "c").await.unwrap();
        assert_eq!(fs::read(rootfs.lower[0].join("etc/a")).unwrap(), [letter; 100_000], "{compression}");
        let absent = store.pull(&format!("{}/harbour/none:1", registry.address), auth()).await.unwrap_err();
        assert!(absent.is_not_found(), "{absent:?}");
    }
    let blobs = walk(&temp.path().join("blobs"));
    let starts = |magic: &[u8]| blobs.iter().any(|blob| blob.starts_with(magic));
    assert!(starts(&[0x1f, 0x8b]) && starts(&[0x28, 0xb5, 0x2f, 0xfd]), "both compressions were there");
}

fn walk(directory: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    entries
        .flat_map(|entry| match entry.file_type().unwrap().is_dir() {
            true => walk(&entry.path()),
            false => vec![fs::read(entry.path()).unwrap()],
        })
        .collect()
}
