//! `oarlock images`: the images of the node's runtime, through its CRI socket.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::{
    ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest, VersionRequest,
};
use oarlock_proto::images::images_client::ImagesClient;
use oarlock_proto::images::{ImportRequest, PruneRequest, PullRequest};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::progress::Bars;
use crate::config::Settings;

#[derive(clap::Args)]
pub(crate) struct ImagesFlags {
    #[command(subcommand)]
    command: ImagesCommand,
}

#[derive(clap::Subcommand)]
enum ImagesCommand {
    /// List images
    Ls,
    /// Pull an image from its registry
    Pull {
        /// For example `registry.example/app:1.0`
        image: String,
    },
    /// Import the images of an OCI layout or `docker save` archive
    Import {
        /// The archive, a file or a directory
        archive: PathBuf,
    },
    /// Remove images that no container uses and that are not pinned
    Prune {
        /// Keep images that a container used within this time, for example `24h` or `7d`
        #[arg(long, default_value = "0s", value_parser = age)]
        unused_for: Duration,
        /// Only list what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove images
    Rm {
        /// References or ids
        #[arg(required = true)]
        images: Vec<String>,
    },
}

pub(crate) fn run(settings: &Settings, flags: ImagesFlags) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = connect(settings).await?;
        match flags.command {
            ImagesCommand::Ls => list(channel).await,
            ImagesCommand::Pull { image } => pull(channel, image).await,
            ImagesCommand::Import { archive } => import(channel, archive).await,
            ImagesCommand::Prune { unused_for, dry_run } => prune(channel, unused_for, dry_run).await,
            ImagesCommand::Rm { images } => remove(channel, images).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Connects to the runtime's socket.
pub(crate) async fn connect(settings: &Settings) -> anyhow::Result<Channel> {
    let socket = settings.runtime_socket.clone();
    Endpoint::from_static("http://runtime")
        .connect_with_connector(tower::service_fn({
            let socket = socket.clone();
            move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }
        }))
        .await
        .with_context(|| {
            let hint = if settings.has_own_runtime() { "is oarlock running?" } else { "is it running?" };
            format!("the runtime does not answer at {}; {hint}", socket.display())
        })
}

/// Name and version of the runtime behind a channel.
pub(crate) async fn version(channel: Channel) -> anyhow::Result<String> {
    let answer = RuntimeServiceClient::new(channel).version(VersionRequest::default()).await.map_err(status)?;
    let answer = answer.into_inner();
    Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
}

/// Whether the runtime has an image of this name.
pub(crate) async fn has(channel: Channel, image: &str) -> anyhow::Result<bool> {
    let request = ImageStatusRequest { image: Some(spec_of(image)), ..ImageStatusRequest::default() };
    let answer = ImageServiceClient::new(channel).image_status(request).await.map_err(status)?;
    Ok(answer.into_inner().image.is_some())
}

fn spec_of(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..ImageSpec::default() }
}

/// Asks the runtime to import an archive of its own file system; prints what came in.
pub(crate) async fn import(channel: Channel, archive: PathBuf) -> anyhow::Result<()> {
    let archive = archive.canonicalize().with_context(|| format!("cannot find {}", archive.display()))?;
    let request = ImportRequest { path: archive.to_string_lossy().into_owned() };
    let mut progress = ImagesClient::new(channel).import(request).await.map_err(status)?.into_inner();
    while let Some(message) = progress.message().await.map_err(status)? {
        for image in message.images {
            println!("imported {} ({})", image.repo_tags.join(", "), size(image.size_bytes));
        }
    }
    Ok(())
}

async fn list(channel: Channel) -> anyhow::Result<()> {
    let answer =
        ImageServiceClient::new(channel).list_images(ListImagesRequest::default()).await.map_err(status)?.into_inner();
    println!("{:<60} {:<20} {:>10}", "IMAGE", "ID", "SIZE");
    for image in answer.images {
        let id: String = image.id.trim_start_matches("sha256:").chars().take(12).collect();
        let names = if image.repo_tags.is_empty() { image.repo_digests.clone() } else { image.repo_tags.clone() };
        for name in names {
            println!("{name:<60} {id:<20} {:>10}", size(image.size));
        }
    }
    Ok(())
}

/// Pulls, with bars for a person who watches.
async fn pull(channel: Channel, image: String) -> anyhow::Result<()> {
    let request = PullRequest { image: image.clone() };
    let mut progress = match ImagesClient::new(channel.clone()).pull(request).await {
        Ok(progress) => progress.into_inner(),
        Err(answer) if answer.code() == Code::Unimplemented => return pull_without_progress(channel, image).await,
        Err(answer) => return Err(status(answer)),
    };
    let watched = std::io::stdout().is_terminal();
    let mut bars = Bars::default();
    while let Some(message) = progress.message().await.map_err(status)? {
        if watched {
            bars.draw(&message.layers, &mut std::io::stdout())?;
        }
        if let Some(pulled) = message.image {
            println!("pulled {image} as {} ({})", pulled.id, size(pulled.size_bytes));
        }
    }
    Ok(())
}

/// Pulls as the agent does: a runtime of others says nothing while it works.
async fn pull_without_progress(channel: Channel, image: String) -> anyhow::Result<()> {
    let request = PullImageRequest { image: Some(spec_of(&image)), ..PullImageRequest::default() };
    let answer = ImageServiceClient::new(channel).pull_image(request).await.map_err(status)?.into_inner();
    println!("pulled {image} as {}", answer.image_ref);
    Ok(())
}

async fn remove(channel: Channel, images: Vec<String>) -> anyhow::Result<()> {
    let mut client = ImageServiceClient::new(channel);
    for image in images {
        let request = RemoveImageRequest { image: Some(spec_of(&image)) };
        client.remove_image(request).await.map_err(status)?;
        println!("removed {image}");
    }
    Ok(())
}

async fn prune(channel: Channel, unused_for: Duration, dry_run: bool) -> anyhow::Result<()> {
    let request = PruneRequest { unused_for_seconds: unused_for.as_secs(), dry_run };
    let answer = ImagesClient::new(channel).prune(request).await.map_err(status)?.into_inner();
    for image in &answer.images {
        let name = image.repo_tags.first().or(image.repo_digests.first()).unwrap_or(&image.id);
        println!("{} {name} ({})", if dry_run { "would remove" } else { "removed" }, size(image.size_bytes));
    }
    if !dry_run {
        println!("{} images removed, {} freed", answer.images.len(), size(answer.freed_bytes));
    }
    Ok(())
}

/// A time in seconds, minutes, hours or days.
pub(crate) fn age(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a number with one of s, m, h, d after it");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// A gRPC status as an error of its message alone. What only our own runtime can do is said as such.
pub(crate) fn status(status: tonic::Status) -> anyhow::Error {
    if status.code() == Code::Unimplemented {
        return anyhow::anyhow!("the node's runtime cannot do this; use its own tools ({})", status.message());
    }
    anyhow::anyhow!("{}", status.message())
}

pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "kB", "MB", "GB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_a_unit() {
        assert_eq!(age("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(age("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "7", "d", "-1h", "1.5h", "7ü", "99999999999999999999d"] {
            assert!(age(bad).is_err(), "{bad}");
        }
    }
}
