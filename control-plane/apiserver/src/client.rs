//! A client without a connection: calls the handler directly, as a given user.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Request;
use http_body_util::BodyExt;
use tower::Service;

use crate::authn::Peer;
use crate::core::Core;
use crate::handler;
use crate::user::User;
use crate::wire::{Answer, BoxError};

#[derive(Clone)]
struct InProcess {
    core: Arc<Core>,
    user: User,
}

impl Service<Request<kube::client::Body>> for InProcess {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<kube::client::Body>) -> Self::Future {
        let request = request.map(|body| body.map_err(|error| Box::new(error) as BoxError).boxed_unsync());
        let answer = handler::handle(self.core.clone(), Peer::InProcess(self.user.clone()), request);
        Box::pin(async move { Ok(answer.await) })
    }
}

pub(crate) fn client(core: Arc<Core>, user: &str, groups: &[&str]) -> kube::Client {
    let user = User::authenticated(user, groups.iter().map(|group| (*group).to_owned()));
    kube::Client::new(InProcess { core, user }, "default")
}
