//! Pulls from registries that ask for credentials, break off, compress otherwise, stand for others or have certificates
//! of their own: one made here, and Debian's docker-registry. Needs root (owners of files), docker-registry and skopeo.

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

#[tokio::test]
async fn an_identity_token_is_exchanged_for_one_of_the_registry() {
    let built = large();
    let registry = Registry::start(&built).await;
    registry.protect(Protection::Identity("refresh-me".into()));
    let reference = format!("{}/test/app:v1", registry.address);
    let temp = tempfile::tempdir().unwrap();
    let credentials = temp.path().join("config.json");
    let registries = RegistryConfig { credentials: Some(credentials.clone()), ..RegistryConfig::default() };
    let store = store(&temp.path().join("store"), registries).await;
    for auth in [None, Some(Auth::Identity("other".into()))] {
        let error = store.pull(&reference, auth).await.unwrap_err();
        assert!(matches!(error, ImageError::Denied { .. }), "{error:?}");
    }
    let image = store.pull(&reference, Some(Auth::Identity("refresh-me".into()))).await.unwrap();
    store.remove(&image.id).await.unwrap();
    let content = format!(r#"{{"auths": {{"{}": {{"identitytoken": "refresh-me"}}}}}}"#, registry.address);
    fs::write(&credentials, content).unwrap();
    store.pull(&reference, None).await.unwrap();
}

/// `hosts.toml` of one registry.
fn write_hosts(hosts_dir: &Path, registry: &str, content: &str) {
    fs::create_dir_all(hosts_dir.join(registry)).unwrap();
    fs::write(hosts_dir.join(registry).join("hosts.toml"), content).unwrap();
}

#[tokio::test]
async fn one_host_says_what_a_tag_names_and_another_gives_it() {
    let built = large();
    let (names, contents) = (Registry::start(&built).await, Registry::start(&built).await);
    let temp = tempfile::tempdir().unwrap();
    let hosts_dir = temp.path().join("certs.d");
    let registries = RegistryConfig { hosts_dirs: vec![hosts_dir.clone()], ..RegistryConfig::default() };
    let store = store(&temp.path().join("store"), registries).await;
    let content = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        names.address, contents.address
    );
    write_hosts(&hosts_dir, "_default", &content);
    let image = store.pull("named.example/test/app:v1", None).await.unwrap();
    assert_eq!(image.repo_tags, ["named.example/test/app:v1"]);
    assert_eq!(names.requests(), ["/v2/test/app/manifests/v1?ns=named.example"]);
    let given = contents.requests();
    assert!(given.iter().all(|path| path.contains("sha256:") && path.ends_with("?ns=named.example")), "{given:?}");

    // One that fails is passed over, and the next has all; a file that cannot be read is told.
    store.remove(&image.id).await.unwrap();
    let content = format!("server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n", names.address);
    write_hosts(&hosts_dir, "_default", &content);
    store.pull("named.example/test/app:v1", None).await.unwrap();
    write_hosts(&hosts_dir, "named.example", "capabilities = [\"pul\"]");
    let error = store.pull("named.example/test/app:v1", None).await.unwrap_err().to_string();
    assert!(error.ends_with("named.example/hosts.toml: capabilities: knows no \"pul\""), "{error}");
}

/// An authority, and pairs that it signed, as PEM files.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    certificate: String,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap().pem();
        Authority { issuer: rcgen::Issuer::new(parameters, key), certificate }
    }

    fn pair(&self, directory: &Path, name: &str) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        let uses = [rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        parameters.extended_key_usages = uses.to_vec();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap().pem();
        fs::write(directory.join(format!("{name}.cert")), certificate).unwrap();
        fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test]
async fn certificates_for_a_registry_are_taken_from_its_own_directory() {
    let temp = tempfile::tempdir().unwrap();
    let (good, bad) = (Authority::new("good"), Authority::new("bad"));
    let files = temp.path().join("files");
    fs::create_dir(&files).unwrap();
    good.pair(temp.path(), "server");
    good.pair(&files, "client");
    fs::write(files.join("ca.crt"), &good.certificate).unwrap();
    fs::write(files.join("bad.pem"), &bad.certificate).unwrap();
    let tls = format!(
        ", tls: {{certificate: {0}/server.cert, key: {0}/server.key, clientcas: [{0}/files/ca.crt]}}",
        temp.path().display()
    );
    let registry = DockerRegistry::start_with(temp.path(), &tls);
    let built = large();
    write_layout(&built, "rower:1", &temp.path().join("layout"));
    let certificates = format!("--dest-cert-dir={}", files.display());
    let reference = registry.push_with(&temp.path().join("layout"), "harbour/rower:tls", "gzip", &certificates);

    let hosts_dir = temp.path().join("certs.d");
    let registries = RegistryConfig { hosts_dirs: vec![hosts_dir.clone()], ..RegistryConfig::default() };
    let store = store(&temp.path().join("store"), registries).await;
    let auth = || Some(Auth::Basic { username: "oar".into(), password: "lock".into() });
    let files = files.display();
    let client = format!("client = [[\"{files}/client.cert\", \"{files}/client.key\"]]");
    for (content, said) in [
        (format!("ca = \"{files}/bad.pem\"\n{client}"), "is not trusted; its authority belongs into the field ca in"),
        (format!("ca = \"{files}/ca.crt\""), "wants a client's certificate, which belongs into the field client in"),
        (format!("ca = \"{files}/absent.pem\""), "absent.pem: No such file"),
        (format!("ca = \"{files}/client.key\""), "has no certificate in PEM form"),
        (format!("client = [[\"{files}/client.cert\", \"{files}/ca.crt\"]]"), "are not a pair in PEM form"),
    ] {
        write_hosts(&hosts_dir, &registry.address, &content);
        let error = store.pull(&reference, auth()).await.unwrap_err().to_string();
        assert!(error.contains(said), "{content}: {error}");
    }
    for content in [format!("ca = [\"{files}/ca.crt\"]\n{client}"), format!("skip_verify = true\n{client}")] {
        write_hosts(&hosts_dir, &registry.address, &content);
        let image = store.pull(&reference, auth()).await.unwrap();
        store.remove(&image.id).await.unwrap();
    }
    // Docker's form: only the certificates; and as a mirror of another, under a path of its own.
    fs::remove_dir_all(&hosts_dir).unwrap();
    fs::create_dir(&hosts_dir).unwrap();
    std::os::unix::fs::symlink(files.to_string(), hosts_dir.join(registry.address.replace(':', "_") + "_")).unwrap();
    let image = store.pull(&reference, auth()).await.unwrap();
    store.remove(&image.id).await.unwrap();
    let content = format!(
        "server = \"https://unreachable.invalid\"\n[host.\"https://{}/v2/harbour\"]\noverride_path = true\n\
         ca = \"{files}/ca.crt\"\n{client}\n",
        registry.address
    );
    write_hosts(&hosts_dir, "far.example", &content);
    store.pull("far.example/rower:tls", auth()).await.unwrap();
}

/// Debian's registry, which ends with its owner.
struct DockerRegistry {
    process: Child,
    address: String,
}

impl DockerRegistry {
    fn start(directory: &Path) -> DockerRegistry {
        DockerRegistry::start_with(directory, "")
    }

    /// `http` is the rest of what is configured of its server.
    fn start_with(directory: &Path, http: &str) -> DockerRegistry {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        fs::write(directory.join("htpasswd"), HTPASSWD).unwrap();
        let configuration = directory.join("registry.yml");
        let content = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {0}/blobs}}}}\nhttp: {{addr: {address}{http}}}\n\
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
        self.push_with(layout, name, compression, "--dest-tls-verify=false")
    }

    fn push_with(&self, layout: &Path, name: &str, compression: &str, tls: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", tls, "--dest-creds=oar:lock"])
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
