//! PullImage.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oarlock_images::{Auth, Credential};

use super::image_status::reference;
use crate::error::Error;

pub(super) async fn pull_image(
    core: &Arc<Core>,
    request: cri::PullImageRequest,
) -> Result<cri::PullImageResponse, Status> {
    let reference = reference(request.image.as_ref())?.to_owned();
    let credential = request.auth.map(credential_of).transpose()?.flatten();
    tracing::info!(image = %reference, "pulling image");
    let image = core.images.pull_with_progress(&reference, credential, None).await.map_err(Error::from)?;
    tracing::info!(image = %reference, image.id = %image.id, "image pulled");
    Ok(cri::PullImageResponse { image_ref: image.id })
}

fn credential_of(mut auth: cri::AuthConfig) -> Result<Option<Credential>, Error> {
    let server = Some(std::mem::take(&mut auth.server_address)).filter(|server| !server.is_empty());
    Ok(auth_of(auth)?.map(|auth| Credential { auth, server }))
}

/// Credentials in any of the forms that clients send.
fn auth_of(auth: cri::AuthConfig) -> Result<Option<Auth>, Error> {
    let invalid = || Error::Invalid("auth.auth: not base64 of user:password".to_owned());
    if !auth.registry_token.is_empty() {
        return Ok(Some(Auth::Bearer(auth.registry_token)));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Auth::Basic { username: auth.username, password: auth.password }));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Auth::Identity(auth.identity_token)));
    }
    if !auth.auth.is_empty() {
        let decoded = STANDARD.decode(auth.auth.trim_end_matches('\0')).map_err(|_| invalid())?;
        let text = String::from_utf8(decoded).map_err(|_| invalid())?;
        let (username, password) = text.split_once(':').ok_or_else(invalid)?;
        let password = password.trim_end_matches('\0').to_owned();
        return Ok(Some(Auth::Basic { username: username.to_owned(), password }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_read_in_every_form() {
        let auth = |change: fn(&mut cri::AuthConfig)| {
            let mut auth = cri::AuthConfig::default();
            change(&mut auth);
            auth_of(auth)
        };
        assert!(matches!(auth(|_| {}), Ok(None)));
        assert!(
            matches!(auth(|a| a.auth = "dTpwOnc=".into()), Ok(Some(Auth::Basic { username, password })) if username == "u" && password == "p:w")
        );
        assert!(matches!(auth(|a| a.registry_token = "t".into()), Ok(Some(Auth::Bearer(token))) if token == "t"));
        assert!(auth(|a| a.auth = "!".into()).is_err());
        assert!(matches!(auth(|a| a.identity_token = "t".into()), Ok(Some(Auth::Identity(token))) if token == "t"));
    }
}
