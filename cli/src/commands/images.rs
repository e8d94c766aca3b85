//! `oarlock images`: the images of the node's runtime, through its CRI socket.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::{ImageSpec, ListImagesRequest, PullImageRequest, RemoveImageRequest};
use oarlock_proto::images::ImportRequest;
use oarlock_proto::images::images_client::ImagesClient;
use tonic::transport::{Channel, Endpoint};

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
            ImagesCommand::Rm { images } => remove(channel, images).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Connects to the runtime's socket.
pub(crate) async fn connect(settings: &Settings) -> anyhow::Result<Channel> {
    let socket = settings.layout.runtime_socket();
    Endpoint::from_static("http://runtime")
        .connect_with_connector(tower::service_fn({
            let socket = socket.clone();
            move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }
        }))
        .await
        .with_context(|| format!("the runtime does not answer at {}; is oarlock running?", socket.display()))
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

async fn pull(channel: Channel, image: String) -> anyhow::Result<()> {
    let request = PullImageRequest {
        image: Some(ImageSpec { image: image.clone(), ..ImageSpec::default() }),
        ..PullImageRequest::default()
    };
    let answer = ImageServiceClient::new(channel).pull_image(request).await.map_err(status)?.into_inner();
    println!("pulled {image} as {}", answer.image_ref);
    Ok(())
}

async fn remove(channel: Channel, images: Vec<String>) -> anyhow::Result<()> {
    let mut client = ImageServiceClient::new(channel);
    for image in images {
        let request = RemoveImageRequest { image: Some(ImageSpec { image: image.clone(), ..ImageSpec::default() }) };
        client.remove_image(request).await.map_err(status)?;
        println!("removed {image}");
    }
    Ok(())
}

/// A gRPC status as an error of its message alone.
pub(crate) fn status(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "kB", "MB", "GB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
