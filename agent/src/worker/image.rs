//! Making sure that a container's image is there.

use std::time::Instant;

use k8s_openapi::api::core::v1::Secret;
use oarlock_proto::cri;

use super::actions::{Job, chain, failed};
use crate::plan::Outcome;
use crate::recorder::Level;
use crate::spec;
use crate::spec::image::{PullPolicy, credentials, pull_policy, with_default_tag};

impl Job {
    pub(super) async fn ensure_image(&self, name: &str) -> Outcome {
        let Some(container) = self.container(name) else { return failed("", "the container is gone") };
        let asked = container.image.clone().unwrap_or_default();
        let image = match with_default_tag(&asked) {
            Ok(image) => image,
            Err(error) => {
                let message = format!("Failed to apply default image tag \"{asked}\": {error}");
                self.tell_failed(name, "InspectFailed", &message);
                self.tell_failed(name, "Failed", "Error: InvalidImageName");
                return failed("InvalidImageName", message);
            }
        };
        let present = match self.shared.runtime.image_status(&image).await {
            Ok(present) => present,
            Err(error) => {
                let message = format!("Failed to inspect image \"{asked}\": {error}");
                self.tell_failed(name, "InspectFailed", &message);
                return failed("ImageInspectError", message);
            }
        };
        match (present, pull_policy(&container)) {
            (Some(found), PullPolicy::IfNotPresent | PullPolicy::Never) => {
                let message =
                    format!("Container image \"{asked}\" already present on machine and can be accessed by the pod");
                self.shared.recorder.container(&self.pod, name, Level::Normal, "Pulled", message);
                Outcome::ImageReady { image_ref: found.id }
            }
            (None, PullPolicy::Never) => {
                let message = format!("Container image \"{asked}\" is not present with pull policy of Never");
                self.tell_failed(name, "ErrImageNeverPull", &message);
                self.tell_failed(name, "Failed", "Error: ErrImageNeverPull");
                failed("ErrImageNeverPull", message)
            }
            _ => self.pull(name, &asked, image).await,
        }
    }

    fn tell_failed(&self, name: &str, reason: &'static str, message: &str) {
        self.shared.recorder.container(&self.pod, name, Level::Warning, reason, message);
    }

    async fn pull(&self, name: &str, asked: &str, image: String) -> Outcome {
        let began = Instant::now();
        let recorder = &self.shared.recorder;
        recorder.container(&self.pod, name, Level::Normal, "Pulling", format!("Pulling image \"{asked}\""));
        let sandbox_config = self.sandbox_config(0, self.shared.users.of(self.uid.as_str())).await;
        let mut auths: Vec<Option<cri::AuthConfig>> =
            credentials(&image, &self.pull_secrets().await).into_iter().map(Some).collect();
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
                    recorder.container(&self.pod, name, Level::Normal, "Pulled", message);
                    return Outcome::ImageReady { image_ref };
                }
                Err(error) => last = error.to_string(),
            }
        }
        self.tell_failed(name, "Failed", &format!("Failed to pull image \"{asked}\": {last}"));
        self.tell_failed(name, "Failed", "Error: ErrImagePull");
        failed("ErrImagePull", last)
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
