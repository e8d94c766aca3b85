//! Watch: a stream of events from a revision on, or of what is there and then from now on.
//!
//! ```text
//! initial objects (unless a revision was given) ─▶ initial-events-end bookmark (if asked for) ─▶ live events
//!                                                       live: event batch │ bookmark timer │ deadline │ too slow: 410
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, stream};
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use oarlock_kinds::Kind;
use oarlock_store::{Event, EventKind, Previous, Range, Record, StoreError, Watch};
use rand::Rng;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::read::{Selection, catch_up, parse_revision};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::negotiate::Form;
use crate::object;
use crate::table::{self, Include};
use crate::wire::{Answer, BoxError};

const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
const MIN_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const BATCH_EVENTS: usize = 128;
const CHUNK_BYTES: usize = 64 << 10;

/// How the watch begins.
struct Start {
    revision: u64,
    initial: VecDeque<Arc<Record>>,
    end_bookmark: bool,
}

/// One watcher.
struct Watcher {
    kind: &'static Kind,
    selection: Selection,
    form: Form,
    include: Include,
    columns_sent: bool,
    initial: VecDeque<Arc<Record>>,
    end_bookmark: bool,
    events: Watch,
    bookmarks: Option<Interval>,
    deadline: Instant,
    stopping: CancellationToken,
    ended: bool,
}

/// Starts a watch. The answer streams until the client leaves, the time is up or the server stops.
pub(crate) async fn watch(ctx: &Context, target: &Target) -> ApiResult<Answer> {
    let query = &ctx.info.query;
    let selection = Selection::of(ctx, target)?;
    let start = begin(ctx, target, &selection).await?;
    let events = ctx
        .core
        .store
        .watch(&selection.prefix, start.revision)
        .map_err(|error| ApiError::from_store(&error, target.kind, ""))?;
    let timeout = match query.number("timeoutSeconds")? {
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds.unsigned_abs()),
        _ => MIN_TIMEOUT.mul_f64(1.0 + rand::rng().random::<f64>()),
    };
    let bookmarks = query.flag("allowWatchBookmarks").then(|| {
        let mut interval = tokio::time::interval_at(Instant::now() + BOOKMARK_INTERVAL, BOOKMARK_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    });
    let watcher = Watcher {
        kind: target.kind,
        selection,
        form: ctx.accept.form,
        include: Include::parse(query.get("includeObject")),
        columns_sent: false,
        initial: start.initial,
        end_bookmark: start.end_bookmark,
        events,
        bookmarks,
        deadline: Instant::now() + timeout,
        stopping: ctx.core.stopping.clone(),
        ended: false,
    };
    let gauge = ctx.core.metrics.watch_started();
    let chunks = stream::unfold((watcher, gauge), |(mut watcher, gauge)| async move {
        let chunk = watcher.next_chunk().await?;
        Some((Ok::<_, BoxError>(Frame::data(chunk)), (watcher, gauge)))
    });
    let mut response = Response::new(StreamBody::new(chunks.boxed()).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

async fn begin(ctx: &Context, target: &Target, selection: &Selection) -> ApiResult<Start> {
    let query = &ctx.info.query;
    let wanted = parse_revision(query.get("resourceVersion"))?;
    let send_initial = query.get("sendInitialEvents").map(|_| query.flag("sendInitialEvents"));
    let matching = query.get("resourceVersionMatch");
    let refuse = |detail: &str| {
        Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Invalid",
            format!("ListOptions.meta.k8s.io \"\" is invalid: {detail}"),
        ))
    };
    match (send_initial, matching) {
        (None, Some(_)) => {
            return refuse(
                "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents \
                 is provided",
            );
        }
        (Some(_), Some("NotOlderThan")) | (None, None) => {}
        (Some(_), _) => {
            return refuse(
                "sendInitialEvents: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            );
        }
    }
    if let Some(wanted) = wanted {
        catch_up(&ctx.core, &selection.prefix, wanted).await?;
    }
    let from_state = match (send_initial, wanted) {
        (Some(choice), _) => choice,
        (None, None | Some(0)) => true,
        (None, Some(_)) => false,
    };
    if !from_state {
        let revision = wanted.filter(|revision| *revision > 0).unwrap_or_else(|| ctx.core.store.current_revision());
        return Ok(Start { revision, initial: VecDeque::new(), end_bookmark: false });
    }
    let range = Range { prefix: &selection.prefix, ..Range::default() };
    let page = ctx.core.store.range(range).map_err(|error| ApiError::from_store(&error, target.kind, ""))?;
    let initial = page.records.into_iter().filter(|record| selection.matches(target.kind, record)).collect();
    let end_bookmark = send_initial == Some(true) && query.flag("allowWatchBookmarks");
    Ok(Start { revision: page.revision, initial, end_bookmark })
}

impl Watcher {
    /// The next bytes to send; `None` at the end.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if !self.initial.is_empty() || self.end_bookmark {
            return Some(self.initial_chunk());
        }
        loop {
            let stopping = self.stopping.clone();
            let next = tokio::select! {
                biased;
                () = stopping.cancelled() => return None,
                events = self.events.next(BATCH_EVENTS) => Some(events),
                () = tick(&mut self.bookmarks) => None,
                () = tokio::time::sleep_until(self.deadline) => {
                    self.ended = true;
                    return self.bookmarks.is_some().then(|| self.bookmark_line(false));
                }
            };
            match next {
                Some(Ok(events)) => {
                    let mut chunk = BytesMut::new();
                    for event in events {
                        self.append(&mut chunk, &event);
                    }
                    if !chunk.is_empty() {
                        return Some(chunk.freeze());
                    }
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Some(error_line(self.kind, &error));
                }
                None => return Some(self.bookmark_line(false)),
            }
        }
    }

    fn initial_chunk(&mut self) -> Bytes {
        let mut chunk = BytesMut::new();
        while chunk.len() < CHUNK_BYTES {
            let Some(record) = self.initial.pop_front() else { break };
            self.append_object(&mut chunk, "ADDED", &record);
        }
        if self.initial.is_empty() && self.end_bookmark {
            self.end_bookmark = false;
            chunk.extend_from_slice(&self.bookmark_line(true));
        }
        chunk.freeze()
    }

    /// Adds what the event means to this watcher: with a selector, an object may come into view or leave it. Of one that leaves
    /// it, the watcher is given the last state that it could see, at the revision of the change, as upstream does.
    fn append(&mut self, chunk: &mut BytesMut, event: &Event) {
        let matches = self.selection.matches(self.kind, &event.record);
        let matched = match &event.previous {
            Previous::Absent => Some(false),
            Previous::Known(previous) => Some(self.selection.matches(self.kind, previous)),
            Previous::Forgotten => None,
        };
        let what = match (event.kind, matches, matched) {
            (EventKind::Delete, true, _) => "DELETED",
            (EventKind::Delete, false, _) => return,
            (EventKind::Put, true, Some(false)) => "ADDED",
            (EventKind::Put, true, _) => "MODIFIED",
            (EventKind::Put, false, Some(false)) => return,
            (EventKind::Put, false, _) => {
                let last = match &event.previous {
                    Previous::Known(previous) => &previous.at_revision(event.record.revision()),
                    Previous::Absent | Previous::Forgotten => &*event.record,
                };
                self.append_object(chunk, "DELETED", last);
                return;
            }
        };
        self.append_object(chunk, what, &event.record);
    }

    fn append_object(&mut self, chunk: &mut BytesMut, what: &str, record: &Record) {
        chunk.put_slice(b"{\"type\":\"");
        chunk.put_slice(what.as_bytes());
        chunk.put_slice(b"\",\"object\":");
        match self.form {
            Form::Object if object::is_native(self.kind) => chunk.put_slice(record.value()),
            Form::Partial { version: "v1" } if object::is_native(self.kind) => {
                chunk.put_slice(&table::partial_bytes(self.kind, record));
            }
            Form::Table { version } => {
                let seen = object::parse_as(self.kind, record);
                let metadata = json!({"resourceVersion": record.revision().to_string()});
                let with_columns = !self.columns_sent;
                self.columns_sent = true;
                let table = table::table(self.kind, version, metadata, vec![seen], self.include, with_columns);
                chunk.put_slice(table.to_string().as_bytes());
            }
            form => {
                let seen = table::render(self.kind, object::parse_as(self.kind, record), form, self.include);
                chunk.put_slice(seen.to_string().as_bytes());
            }
        }
        chunk.put_slice(b"}\n");
    }

    fn bookmark_line(&self, initial_events_end: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": self.events.revision().to_string(), "creationTimestamp": null});
        if initial_events_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.form {
            Form::Object => {
                json!({"kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata})
            }
            Form::Partial { version } => json!({
                "kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata,
            }),
            Form::Table { version } => table::table(self.kind, version, metadata, Vec::new(), self.include, false),
        };
        line("BOOKMARK", &object)
    }
}

async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

fn error_line(kind: &Kind, error: &StoreError) -> Bytes {
    line("ERROR", &ApiError::from_store(error, kind, "").status())
}

fn line(what: &str, object: &Value) -> Bytes {
    let mut text = json!({"type": what, "object": object}).to_string();
    text.push('\n');
    text.into()
}
