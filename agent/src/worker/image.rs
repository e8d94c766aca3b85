//! Making sure that the images which a container needs are there: its own, and those that it mounts.

use std::time::Instant;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ImageVolumeSource, Secret, ServiceAccount, VolumeMount};
use oarlock_proto::cri;
use oarlock_volumes::{ObjectSource, TokenOrder};

use super::actions::{Job, failed};
use super::start::absolute;
use crate::error::chain;
use crate::plan::Outcome;
use crate::pull_credentials::Puller;
use crate::recorder::Level;
use crate::spec;
use crate::spec::image::{PullPolicy, credentials, image_volumes, pull_policy, with_default_tag};

/// An image that the pod needs: a container's own, or one behind a volume.
struct Wanted<'a> {
    /// Whose image it is; None is the pod's, for a volume.
    container: Option<&'a str>,
    /// As the manifest has it.
    asked: &'a str,
    policy: PullPolicy,
}

/// Why an image is not there: a waiting reason and a message.
type Failure = (&'static str, String);

impl Job {
    /// The container's image, and those that it mounts.
    pub(super) async fn ensure_image(&self, name: &str) -> Outcome {
        let Some(container) = self.container(name) else { return failed("", "the container is gone") };
        let asked = container.image.clone().unwrap_or_default();
        let policy = pull_policy(container.image_pull_policy.as_deref(), &asked);
        let own = match self.ensure(&Wanted { container: Some(name), asked: &asked, policy }).await {
            Ok(image_ref) => image_ref,
            Err((reason, message)) => return failed(reason, message),
        };
        for volume in image_volumes(&self.pod, &container) {
            let asked = volume.reference.as_deref().unwrap_or_default();
            let policy = pull_policy(volume.pull_policy.as_deref(), asked);
            if let Err((reason, message)) = self.ensure(&Wanted { container: None, asked, policy }).await {
                self.shared.recorder.container(&self.pod, name, Level::Warning, "Failed", format!("Error: {reason}"));
                return failed(reason, message);
            }
        }
        Outcome::ImageReady { image_ref: own }
    }

    /// Sees to it that the image is there; gives what the runtime calls it.
    async fn ensure(&self, wanted: &Wanted<'_>) -> Result<String, Failure> {
        let asked = wanted.asked;
        let image = match with_default_tag(asked) {
            Ok(image) => image,
            Err(error) => {
                let message = format!("Failed to apply default image tag \"{asked}\": {error}");
                self.tell(wanted, Level::Warning, "InspectFailed", message.clone());
                return Err(self.refused(wanted, "InvalidImageName", message));
            }
        };
        let present = match self.shared.runtime.image_status(&image).await {
            Ok(present) => present,
            Err(error) => {
                let message = format!("Failed to inspect image \"{asked}\": {error}");
                self.tell(wanted, Level::Warning, "InspectFailed", message.clone());
                return Err(("ImageInspectError", message));
            }
        };
        match (present, wanted.policy) {
            (Some(found), PullPolicy::IfNotPresent | PullPolicy::Never) => {
                let message =
                    format!("Container image \"{asked}\" already present on machine and can be accessed by the pod");
                self.tell(wanted, Level::Normal, "Pulled", message);
                Ok(found.id)
            }
            (None, PullPolicy::Never) => {
                let message = format!("Container image \"{asked}\" is not present with pull policy of Never");
                self.tell(wanted, Level::Warning, "ErrImageNeverPull", message.clone());
                Err(self.refused(wanted, "ErrImageNeverPull", message))
            }
            _ => self.pull(wanted, image).await,
        }
    }

    fn tell(&self, wanted: &Wanted<'_>, level: Level, reason: &'static str, message: String) {
        match wanted.container {
            Some(name) => self.shared.recorder.container(&self.pod, name, level, reason, message),
            None => self.shared.recorder.pod(&self.pod, level, reason, message),
        }
    }

    fn refused(&self, wanted: &Wanted<'_>, reason: &'static str, message: String) -> Failure {
        // A volume's is told with the container that needs it.
        if wanted.container.is_some() {
            self.tell(wanted, Level::Warning, "Failed", format!("Error: {reason}"));
        }
        (reason, message)
    }

    async fn pull(&self, wanted: &Wanted<'_>, image: String) -> Result<String, Failure> {
        let (asked, began) = (wanted.asked, Instant::now());
        self.tell(wanted, Level::Normal, "Pulling", format!("Pulling image \"{asked}\""));
        let sandbox_config = self.sandbox_config(0, self.shared.users.of(self.uid.as_str())).await;
        let of_secrets = credentials(&image, &self.pull_secrets().await);
        let of_plugins = self.shared.pull_credentials.credentials(&image, self).await;
        let mut auths: Vec<Option<cri::AuthConfig>> = of_secrets.into_iter().chain(of_plugins).map(Some).collect();
        if auths.is_empty() {
            auths.push(None);
        }
        let _turn = self.shared.pulls.acquire().await;
        let pulling_since = Instant::now();
        let mut last = String::new();
        for auth in auths {
            let spec = cri::ImageSpec { image: image.clone(), ..Default::default() };
            let request =
                cri::PullImageRequest { image: Some(spec), auth, sandbox_config: Some(sandbox_config.clone()) };
            match self.shared.runtime.pull_image(request).await {
                Ok(image_ref) => {
                    let size = self.shared.runtime.image_status(&image_ref).await.ok().flatten().map_or(0, |i| i.size);
                    let (took, waited) = (pulling_since.elapsed(), began.elapsed());
                    let message = format!(
                        "Successfully pulled image \"{asked}\" in {took:.0?} ({waited:.0?} including waiting). Image size: {size} bytes."
                    );
                    self.tell(wanted, Level::Normal, "Pulled", message);
                    return Ok(image_ref);
                }
                Err(error) => last = error.to_string(),
            }
        }
        self.tell(wanted, Level::Warning, "Failed", format!("Failed to pull image \"{asked}\": {last}"));
        Err(self.refused(wanted, "ErrImagePull", last))
    }

    /// What the runtime mounts for a volume that is an image.
    pub(super) async fn image_mount(
        &self,
        source: &ImageVolumeSource,
        mount: &VolumeMount,
    ) -> Result<cri::Mount, String> {
        let asked = source.reference.clone().unwrap_or_default();
        let found = self.shared.runtime.image_status(&with_default_tag(&asked)?).await.map_err(|e| e.to_string())?;
        let found = found.ok_or_else(|| format!("image {asked:?} is not there any more"))?;
        let image = cri::ImageSpec { image: found.id, user_specified_image: asked, ..Default::default() };
        Ok(cri::Mount {
            container_path: absolute(&mount.mount_path),
            image: Some(image),
            image_sub_path: mount.sub_path.clone().unwrap_or_default(),
            readonly: true,
            ..Default::default()
        })
    }

    /// The pull secrets that the pod names and that exist.
    async fn pull_secrets(&self) -> Vec<Secret> {
        let names = self.pod.spec.as_ref().and_then(|spec| spec.image_pull_secrets.clone()).unwrap_or_default();
        let namespace = spec::pod_namespace(&self.pod);
        let mut secrets = Vec::new();
        for reference in names {
            match self.shared.objects.fetch_secret(namespace, &reference.name).await {
                Ok(Some(secret)) => secrets.push(secret),
                Ok(None) => {
                    let message = format!(
                        "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                        reference.name
                    );
                    self.shared.recorder.pod(&self.pod, Level::Warning, "FailedToRetrieveImagePullSecret", message);
                }
                Err(error) => tracing::debug!(error = chain(&error), "pull secret could not be fetched"),
            }
        }
        secrets
    }
}

/// How long a token for a plugin is good for: what the API gives where nothing is asked.
const TOKEN_SECONDS: i64 = 3600;

#[async_trait]
impl Puller for Job {
    async fn service_account(&self) -> Result<Option<ServiceAccount>, String> {
        let Some(name) = self.service_account_name() else { return Ok(None) };
        let namespace = spec::pod_namespace(&self.pod);
        let found = self.shared.objects.fetch_service_account(namespace, name).await;
        let found = found.map_err(|error| chain(&error))?;
        found.map(Some).ok_or_else(|| format!("service account {name:?} was not found"))
    }

    async fn token(&self, audience: &str) -> Result<String, String> {
        let order = TokenOrder {
            namespace: spec::pod_namespace(&self.pod).to_owned(),
            service_account: self.service_account_name().unwrap_or_default().to_owned(),
            audience: Some(audience.to_owned()),
            expiration_seconds: TOKEN_SECONDS,
            pod_name: spec::pod_name(&self.pod).to_owned(),
            pod_uid: spec::pod_uid(&self.pod).to_owned(),
        };
        self.shared.objects.token(&order).await.map(|issued| issued.token).map_err(|error| chain(&error))
    }
}

impl Job {
    /// A static pod has none.
    fn service_account_name(&self) -> Option<&str> {
        let name = self.pod.spec.as_ref()?.service_account_name.as_deref();
        name.filter(|name| !name.is_empty() && !spec::is_static(&self.pod))
    }
}
