//! What each path answers, once the request is allowed.

use std::sync::Arc;

use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answer, error, json, of_type, text};
use crate::backend::{ContainerRef, MetricsPage, NodeBackend, NodeError};
use crate::query::{self, Query, Route};
use crate::{logs, summary, upgrade};

/// Pieces of a log waiting to be sent.
const LOG_QUEUE: usize = 8;
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers requests.
pub(crate) struct Handlers {
    backend: Arc<dyn NodeBackend>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    /// Whether logs and sessions in containers are served.
    debugging: bool,
}

impl Handlers {
    pub fn new(
        backend: Arc<dyn NodeBackend>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
        debugging: bool,
    ) -> Self {
        Self { backend, tasks, shutdown, debugging }
    }

    pub async fn handle(&self, request: Request<Incoming>) -> Response<Answer> {
        let Some(route) = Route::of(request.uri().path()) else {
            return text(StatusCode::NOT_FOUND, "404 page not found");
        };
        if !self.debugging && route.is_debugging() {
            return text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.");
        }
        let allowed: &[Method] = match route {
            Route::Exec(_) | Route::Attach(_) | Route::PortForward(_) | Route::StatsSummary => {
                &[Method::GET, Method::POST]
            }
            Route::Run(_) | Route::Checkpoint(_) => &[Method::POST],
            _ => &[Method::GET],
        };
        if !allowed.contains(request.method()) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
        }
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let answered = match route {
            Route::Healthz => Ok(self.healthz().await),
            Route::Pods => Ok(json(&self.backend.pods().await)),
            Route::RunningPods => Ok(json(&self.backend.running_pods().await)),
            Route::StatsSummary => Ok(json(&self.stats(&query).await)),
            Route::Configz => Ok(json(&self.backend.configz().await)),
            Route::Metrics => Ok(self.metrics(MetricsPage::Agent).await),
            Route::MetricsResource => Ok(self.metrics(MetricsPage::Resource).await),
            Route::MetricsCAdvisor => Ok(self.metrics(MetricsPage::CAdvisor).await),
            Route::MetricsProbes => Ok(self.metrics(MetricsPage::Probes).await),
            Route::Logs(target) => self.logs(target, &query).await,
            Route::Run(target) => self.run(target, &query).await,
            Route::Checkpoint(target) => self.checkpoint(target, &query).await,
            Route::Exec(_) | Route::Attach(_) | Route::PortForward(_) => self.upgrade(route, &query, request).await,
        };
        answered.unwrap_or_else(|refused| error(&refused))
    }

    async fn healthz(&self) -> Response<Answer> {
        match self.backend.healthy().await {
            Ok(()) => text(StatusCode::OK, "ok"),
            Err(message) => text(StatusCode::INTERNAL_SERVER_ERROR, &message),
        }
    }

    async fn stats(&self, query: &Query) -> Value {
        let stats = self.backend.stats_summary().await;
        if query.flag("only_cpu_and_memory") { summary::only_cpu_and_memory(&stats) } else { stats }
    }

    async fn metrics(&self, page: MetricsPage) -> Response<Answer> {
        of_type(StatusCode::OK, PROMETHEUS, self.backend.metrics(page).await)
    }

    async fn run(&self, target: ContainerRef, query: &Query) -> Result<Response<Answer>, NodeError> {
        let request = query::run_request(target, query).map_err(NodeError::BadRequest)?;
        let output = self.backend.run_in_container(request).await?;
        Ok(of_type(StatusCode::OK, "text/plain; charset=utf-8", output))
    }

    async fn checkpoint(&self, target: ContainerRef, query: &Query) -> Result<Response<Answer>, NodeError> {
        let timeout = query::checkpoint_timeout(query).map_err(NodeError::BadRequest)?;
        self.backend.checkpoint(target, timeout).await.map(|items| json(&json!({ "items": items })))
    }

    async fn logs(&self, target: ContainerRef, query: &Query) -> Result<Response<Answer>, NodeError> {
        let (options, previous) = query::log_options(query, Timestamp::now()).map_err(NodeError::BadRequest)?;
        let ContainerRef { namespace, pod, container, .. } = &target;
        let file = self.backend.container_log_path(namespace, pod, container, previous).await?;
        let reader = logs::open(&file).await.map_err(|failed| match failed.kind() {
            std::io::ErrorKind::NotFound => {
                NodeError::NotFound(format!("the log file of container \"{container}\" in pod \"{pod}\" is not there"))
            }
            _ => NodeError::Internal(format!(
                "failed to open the log file of container \"{container}\" in pod \"{pod}\": {failed}"
            )),
        })?;
        let (sender, receiver) = mpsc::channel(LOG_QUEUE);
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            let gone = sender.clone();
            let result = tokio::select! {
                () = gone.closed() => return,
                () = shutdown.cancelled() => return,
                result = logs::copy(reader, file, options, &sender) => result,
            };
            if let Err(failed) = result {
                tracing::debug!(error = %failed, "reading a container's log failed");
                let _ = sender.send(Err(failed)).await;
            }
        });
        let frames = ReceiverStream::new(receiver).map(|piece| piece.map(Frame::data));
        let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        Ok(response)
    }

    /// Proxies to the runtime's streaming server.
    async fn upgrade(
        &self,
        route: Route,
        query: &Query,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, NodeError> {
        let bad = NodeError::BadRequest;
        if !upgrade::is_upgrade(request.headers()) {
            return Err(bad("Upgrade request required".to_string()));
        }
        let url = match route {
            Route::Exec(target) => {
                let exec = query::exec_request(target, query).map_err(bad)?;
                if exec.command.is_empty() {
                    return Err(bad("command is required".to_string()));
                }
                self.backend.exec_url(exec).await?
            }
            Route::Attach(target) => self.backend.attach_url(query::exec_request(target, query).map_err(bad)?).await?,
            Route::PortForward(target) => {
                self.backend.port_forward_url(query::port_forward_request(target, query).map_err(bad)?).await?
            }
            _ => return Err(bad("not an upgrade path".to_string())),
        };
        upgrade::proxy(request, &url, &self.tasks, self.shutdown.clone()).await
    }
}
