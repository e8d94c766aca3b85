//! An API server of lists and watches only: objects rendered once and sent as they are, so that what is measured is the
//! reader. No writes, no discovery; any other kind is an empty list.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Objects and watchers by the last word of their path, such as `services`.
#[derive(Default)]
pub(crate) struct ListServer {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    objects: HashMap<String, Vec<Bytes>>,
    watchers: HashMap<String, Vec<mpsc::UnboundedSender<Bytes>>>,
    first_request: Option<Instant>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl ListServer {
    /// Serves on a free port of loopback for as long as the runtime lives.
    pub(crate) async fn start(objects: HashMap<String, Vec<Bytes>>) -> std::io::Result<(Arc<ListServer>, SocketAddr)> {
        let server = Arc::new(ListServer { state: Mutex::new(State { objects, ..State::default() }) });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let serving = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let server = serving.clone();
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                        let response = server.answer(&request);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    // A reader that goes away is no error here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok((server, address))
    }

    /// When the first list was asked for.
    pub(crate) fn first_request(&self) -> Option<Instant> {
        self.state.lock().first_request
    }

    /// Sends an event to all who watch; returns the moment before.
    pub(crate) fn send(&self, resource: &str, event: &str, object: &Bytes) -> Instant {
        let line = Bytes::from([b"{\"type\":\"", event.as_bytes(), b"\",\"object\":", object, b"}\n"].concat());
        let mut state = self.state.lock();
        let watchers = state.watchers.entry(resource.to_owned()).or_default();
        let before = Instant::now();
        watchers.retain(|watcher| watcher.send(line.clone()).is_ok());
        before
    }

    /// Whether somebody watches.
    pub(crate) fn is_watched(&self, resource: &str) -> bool {
        self.state.lock().watchers.get(resource).is_some_and(|watchers| !watchers.is_empty())
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let resource = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let query: HashMap<&str, &str> =
            request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')).collect();
        let mut state = self.state.lock();
        if query.contains_key("watch") {
            let (sender, receiver) = mpsc::unbounded_channel();
            state.watchers.entry(resource).or_default().push(sender);
            let frames = futures::stream::unfold(receiver, |mut receiver| async move {
                let bytes = receiver.recv().await?;
                Some((Ok::<_, Infallible>(Frame::data(bytes)), receiver))
            });
            return Response::new(StreamBody::new(frames).boxed_unsync());
        }
        state.first_request.get_or_insert_with(Instant::now);
        let start: usize = query.get("continue").and_then(|text| text.parse().ok()).unwrap_or(0);
        let limit: usize = query.get("limit").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
        let all = state.objects.get(&resource).map(Vec::as_slice).unwrap_or_default();
        let end = start.saturating_add(limit).min(all.len());
        let next = if end < all.len() { end.to_string() } else { String::new() };
        let mut body = format!(
            "{{\"kind\":\"List\",\"apiVersion\":\"v1\",\"metadata\":{{\"resourceVersion\":\"1\",\"continue\":\"{next}\"}},\"items\":["
        )
        .into_bytes();
        for (position, object) in all.get(start..end).unwrap_or_default().iter().enumerate() {
            if position > 0 {
                body.push(b',');
            }
            body.extend_from_slice(object);
        }
        body.extend_from_slice(b"]}");
        let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
        response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        response
    }
}
