//! `bench pull`: an image of several layers fetched from a registry on loopback and unpacked, by our runtime and by its
//! peers in the same run, each time with nothing of it there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::{ImageSpec, PullImageRequest, RemoveImageRequest};
use oarlock_testkit::wait_for;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cri::connect;
use crate::peer::{self, Containerd, Runtime};
use crate::table::{self, Row};

const PATIENCE: Duration = Duration::from_secs(60);
/// Files of one layer.
const FILES: usize = 400;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct PullFlags {
    /// Cold pulls of each runtime
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Size of the image, unpacked, in MB
    #[arg(long, default_value_t = 500)]
    megabytes: usize,
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Measure containerd too, where it is installed
    #[arg(long)]
    peers: bool,
}

pub(crate) fn run(flags: &PullFlags) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("oarlock-perf-pull-").tempdir()?;
    let layout = directory.path().join("layout");
    let compressed = write_layout(&layout, flags)?;
    let registry = Registry::start(directory.path())?;
    let image = registry.push(&layout)?;
    fs::remove_dir_all(&layout)?;
    println!(
        "{} MB in {} layers of {FILES} files, {} MB compressed",
        flags.megabytes,
        flags.layers,
        compressed / 1_000_000
    );

    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut rows = Vec::new();
    let mut memory = Vec::new();
    let mut one = |runtime: Box<dyn Runtime>| -> anyhow::Result<()> {
        let name = runtime.name();
        let samples = threads.block_on(pulls(&*runtime, &image, flags.rounds)).with_context(|| name.clone())?;
        let peak = runtime.daemon()?.status()?.vmhwm.unwrap_or_default();
        memory.push(json!({ "name": name, "daemon_peak_rss_kb": peak }));
        println!("{name}: the daemon's resident set was {} MB at most", peak / 1024);
        rows.push(Row { name, samples });
        Ok(())
    };
    one(peer::ours()?)?;
    if flags.peers {
        // Which program starts containers makes no difference to a pull.
        for (name, program) in peer::peers().into_iter().take(1) {
            one(Box::new(Containerd::start(name, &program)?))?;
        }
    }
    table::print("cold pull", &rows);
    println!("{}", json!({ "bench": "memory of a pull", "rows": memory }));
    Ok(())
}

async fn pulls(runtime: &dyn Runtime, image: &str, rounds: usize) -> anyhow::Result<Vec<f64>> {
    let mut client = ImageServiceClient::new(connect(runtime.socket()).await?);
    let image = ImageSpec { image: image.to_owned(), ..ImageSpec::default() };
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let request = PullImageRequest { image: Some(image.clone()), ..PullImageRequest::default() };
        let start = Instant::now();
        client.pull_image(request).await?;
        samples.push(start.elapsed().as_secs_f64() * 1000.0);
        client.remove_image(RemoveImageRequest { image: Some(image.clone()) }).await?;
    }
    Ok(samples)
}

/// Writes an OCI image layout; returns the bytes of its compressed layers.
fn write_layout(directory: &Path, flags: &PullFlags) -> anyhow::Result<u64> {
    fs::create_dir_all(directory.join("blobs/sha256"))?;
    let size = flags.megabytes * 1_000_000 / flags.layers.max(1) / FILES;
    let (mut layers, mut diff_ids, mut compressed) = (Vec::new(), Vec::new(), 0);
    for number in 0..flags.layers {
        let tar = layer(number, size)?;
        diff_ids.push(digest(&tar));
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(&tar)?;
        let blob = encoder.finish()?;
        compressed += blob.len() as u64;
        layers.push(put(directory, "application/vnd.oci.image.layer.v1.tar+gzip", &blob)?);
    }
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Cmd": ["/program"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = put(directory, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let mut entry = put(directory, media_type, manifest.to_string().as_bytes())?;
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "1" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(directory.join("index.json"), index.to_string())?;
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(compressed)
}

/// Files of which about half can be compressed away, as with programs; no two are alike.
fn layer(number: usize, size: usize) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::with_capacity(size * FILES * 11 / 10));
    let mut state = number as u64 + 1;
    for file in 0..FILES {
        let mut content = Vec::with_capacity(size + 16);
        while content.len() < size {
            // xorshift64: what matters is only that it cannot be compressed.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
            content.extend_from_slice(b"\0\0\0\0text");
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, format!("layer-{number}/{}/file-{file}", file % 20), &*content)?;
    }
    tar.into_inner()
}

fn put(directory: &Path, media_type: &str, content: &[u8]) -> io::Result<Value> {
    let digest = digest(content);
    let name = digest.trim_start_matches("sha256:");
    File::create(directory.join("blobs/sha256").join(name))?.write_all(content)?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": content.len() }))
}

fn digest(content: &[u8]) -> String {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// docker-registry of the distribution; it ends with its owner.
struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    fn start(directory: &Path) -> anyhow::Result<Self> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let address = format!("127.0.0.1:{}", free.port());
        let configuration = directory.join("registry.yml");
        let blobs = directory.join("registry");
        fs::write(
            &configuration,
            format!(
                "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
                blobs.display()
            ),
        )?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start docker-registry")?;
        let registry = Self { process, address };
        wait_for("the registry", PATIENCE, || TcpStream::connect(&registry.address).ok());
        Ok(registry)
    }

    fn push(&self, layout: &Path) -> anyhow::Result<String> {
        let image = format!("{}/perf/layers:1", self.address);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:1", layout.display()))
            .arg(format!("docker://{image}"))
            .output()
            .context("cannot run skopeo")?;
        anyhow::ensure!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        Ok(image)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
