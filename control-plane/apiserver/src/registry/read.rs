//! Get and list.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use oarlock_kinds::Kind;
use oarlock_store::{Range, Record, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::respond::{record_answer, spelled};
use crate::core::{Context, Core, Target};
use crate::error::{ApiError, ApiResult, too_large_revision};
use crate::negotiate::{Form, Spelling};
use crate::object;
use crate::selector::{FieldSelector, LabelSelector};
use crate::table::{self, Include};
use crate::wire::{Answer, BoxError};

/// How long a read waits for a revision it must not be older than.
const CATCH_UP: Duration = Duration::from_secs(3);
const CHUNK_BYTES: usize = 64 << 10;

/// Which objects of a kind a request selects.
pub(crate) struct Selection {
    pub(crate) prefix: String,
    pub(crate) labels: LabelSelector,
    pub(crate) fields: FieldSelector,
}

impl Selection {
    pub(crate) fn of(ctx: &Context, target: &Target) -> ApiResult<Selection> {
        let query = &ctx.info.query;
        let labels = LabelSelector::parse(query.get("labelSelector").unwrap_or_default())?;
        let fields = FieldSelector::parse(query.get("fieldSelector").unwrap_or_default(), target.kind)?;
        Ok(Selection { prefix: object::key(target.kind, &target.namespace, ""), labels, fields })
    }

    pub(crate) fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    pub(crate) fn matches(&self, kind: &Kind, record: &Record) -> bool {
        if self.is_everything() {
            return true;
        }
        if !object::is_native(kind) && !self.fields.is_everything() {
            let seen = object::Index::of(kind, &object::parse_as(kind, record));
            return self.labels.matches(&seen.labels) && self.fields.matches(record.key(), kind.namespaced, &seen);
        }
        let index = object::index(kind, record);
        self.labels.matches(&index.labels) && self.fields.matches(record.key(), kind.namespaced, index)
    }
}

/// Checks a `resourceVersion` parameter; empty is `None`.
pub(crate) fn parse_revision(text: Option<&str>) -> ApiResult<Option<u64>> {
    let invalid = |text: &str| {
        ApiError::bad_request(format!("Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"))
    };
    text.map(|text| text.parse().map_err(|_| invalid(text))).transpose()
}

/// Waits until the store has reached a revision, for a bounded time.
pub(crate) async fn catch_up(core: &Core, prefix: &str, revision: u64) -> ApiResult<()> {
    let current = core.store.current_revision();
    if revision <= current {
        return Ok(());
    }
    let Ok(mut changes) = core.store.watch(prefix, current) else {
        return Err(too_large_revision(revision, current));
    };
    let reached = async {
        while core.store.current_revision() < revision {
            if changes.next(64).await.is_err() {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(CATCH_UP, reached).await;
    let current = core.store.current_revision();
    if revision <= current { Ok(()) } else { Err(too_large_revision(revision, current)) }
}

/// One object.
pub(crate) async fn get(ctx: &Context, target: &Target) -> ApiResult<Answer> {
    if let Some(revision) = parse_revision(ctx.info.query.get("resourceVersion"))? {
        catch_up(&ctx.core, &object::bucket(target.kind), revision).await?;
    }
    let record = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    record_answer(ctx, StatusCode::OK, target.kind, &record)
}

#[derive(Serialize, Deserialize)]
struct ContinueToken {
    v: String,
    rv: u64,
    start: String,
}

impl ContinueToken {
    fn encode(revision: u64, start: &str) -> String {
        let token = json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start});
        URL_SAFE_NO_PAD.encode(token.to_string())
    }

    fn decode(text: &str) -> ApiResult<ContinueToken> {
        let invalid = || ApiError::bad_request("continue key is not valid");
        let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| invalid())?;
        let token: ContinueToken = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
        if token.v == "meta.k8s.io/v1" { Ok(token) } else { Err(invalid()) }
    }
}

/// The records of one page and what its list metadata says.
pub(crate) struct Listed {
    pub(crate) revision: u64,
    pub(crate) records: Vec<Arc<Record>>,
    pub(crate) next: Option<String>,
    pub(crate) remaining: Option<usize>,
}

/// Carries out a list request up to, but without, its rendering.
pub(crate) async fn select(ctx: &Context, target: &Target) -> ApiResult<Listed> {
    let query = &ctx.info.query;
    let selection = Selection::of(ctx, target)?;
    let limit = usize::try_from(query.number("limit")?.unwrap_or(0)).unwrap_or(0);
    let wanted = parse_revision(query.get("resourceVersion"))?;
    let token = query.get("continue").map(ContinueToken::decode).transpose()?;
    let matching = query.get("resourceVersionMatch");
    check_match(matching, wanted, token.is_some())?;
    if let Some(wanted) = wanted.filter(|_| token.is_none()) {
        catch_up(&ctx.core, &selection.prefix, wanted).await?;
    }
    let exact = matching == Some("Exact");
    let at_revision = match &token {
        Some(token) if token.rv > 0 => Some(token.rv),
        Some(_) => None,
        None => wanted.filter(|_| exact),
    };
    let after = token.as_ref().map(|token| format!("{}{}", selection.prefix, token.start));
    let whole = selection.is_everything();
    let range =
        Range { prefix: &selection.prefix, after: after.as_deref(), limit: if whole { limit } else { 0 }, at_revision };
    let page = ctx.core.store.range(range).map_err(|error| expired_list(&error, target.kind, token.as_ref()))?;
    let mut records = page.records;
    let mut remaining = Some(page.remaining);
    let mut more = page.remaining > 0;
    if !whole {
        records.retain(|record| selection.matches(target.kind, record));
        more = limit > 0 && records.len() > limit;
        if more {
            records.truncate(limit);
        }
        remaining = None;
    }
    let next = records.last().filter(|_| more).map(|last| {
        ContinueToken::encode(page.revision, last.key().strip_prefix(&*selection.prefix).unwrap_or_default())
    });
    let remaining = remaining.filter(|_| next.is_some());
    Ok(Listed { revision: page.revision, records, next, remaining })
}

fn check_match(matching: Option<&str>, wanted: Option<u64>, continued: bool) -> ApiResult<()> {
    let refuse = |detail: &str| {
        Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Invalid",
            format!("ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: {detail}"),
        ))
    };
    match matching {
        None => Ok(()),
        Some(_) if continued => refuse("Forbidden: resourceVersionMatch is forbidden when continue is provided"),
        Some(_) if wanted.is_none() => {
            refuse("Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided")
        }
        Some("Exact") if wanted == Some(0) => {
            refuse("Forbidden: resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"")
        }
        Some("Exact" | "NotOlderThan") => Ok(()),
        Some(other) => refuse(&format!("Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\"")),
    }
}

fn expired_list(error: &StoreError, kind: &Kind, token: Option<&ContinueToken>) -> ApiError {
    let (StoreError::Compacted { .. }, Some(token)) = (error, token) else {
        return ApiError::from_store(error, kind, "");
    };
    let mut expired = ApiError::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list \
         without the continue parameter, or use the continue token in this response to retrieve the remainder of the \
         results. Continuing with the provided token results in an inconsistent list - objects that were created, \
         modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    expired.continue_token = Some(ContinueToken::encode(0, &token.start).into());
    expired
}

/// A list of objects, in the negotiated form.
pub(crate) async fn list(ctx: &Context, target: &Target) -> ApiResult<Answer> {
    let listed = select(ctx, target).await?;
    let mut metadata = Map::new();
    metadata.insert("resourceVersion".into(), listed.revision.to_string().into());
    if let Some(next) = listed.next {
        metadata.insert("continue".into(), next.into());
    }
    if let Some(remaining) = listed.remaining {
        metadata.insert("remainingItemCount".into(), remaining.into());
    }
    let kind = target.kind;
    let json = ctx.accept.spelling == Spelling::Json;
    match ctx.accept.form {
        Form::Table { version } => {
            let objects = listed.records.iter().map(|record| object::parse_as(kind, record)).collect();
            let include = Include::parse(ctx.info.query.get("includeObject"));
            let table = table::table(kind, version, metadata.into(), objects, include, true);
            spelled(ctx, StatusCode::OK, &table)
        }
        Form::Partial { version: "v1" } if json && object::is_native(kind) => {
            let head = list_head("PartialObjectMetadataList", "meta.k8s.io/v1", metadata);
            Ok(streamed(head, listed.records, move |record| table::partial_bytes(kind, record)))
        }
        Form::Object if json && object::is_native(kind) => {
            let head = list_head(&format!("{}List", kind.kind), &kind.api_version(), metadata);
            Ok(streamed(head, listed.records, |record| record.value().clone()))
        }
        form => {
            let (list_kind, api_version) = match form {
                Form::Partial { version } => ("PartialObjectMetadataList".to_owned(), format!("meta.k8s.io/{version}")),
                _ => (format!("{}List", kind.kind), kind.api_version()),
            };
            let items: Vec<Value> = listed
                .records
                .iter()
                .map(|record| table::render(kind, object::parse_as(kind, record), form, Include::None))
                .collect();
            let list = json!({"kind": list_kind, "apiVersion": api_version, "metadata": metadata, "items": items});
            spelled(ctx, StatusCode::OK, &list)
        }
    }
}

fn list_head(kind: &str, api_version: &str, metadata: Map<String, Value>) -> Vec<u8> {
    let head = json!({"kind": kind, "apiVersion": api_version, "metadata": metadata}).to_string();
    let mut head = head.into_bytes();
    head.pop();
    head.extend_from_slice(br#","items":["#);
    head
}

/// Sends a list in chunks, so that a long one is never in memory twice. A short one is sent at once.
fn streamed(head: Vec<u8>, records: Vec<Arc<Record>>, item: impl Fn(&Record) -> Bytes + Send + 'static) -> Answer {
    let mut buffer = BytesMut::from(&head[..]);
    let mut records = records.into_iter().enumerate().fuse();
    let mut finished = false;
    let chunks = stream::poll_fn(move |_| {
        while !finished && buffer.len() < CHUNK_BYTES {
            match records.next() {
                Some((at, record)) => {
                    if at > 0 {
                        buffer.extend_from_slice(b",");
                    }
                    buffer.extend_from_slice(&item(&record));
                }
                None => {
                    buffer.extend_from_slice(b"]}\n");
                    finished = true;
                }
            }
        }
        std::task::Poll::Ready((!buffer.is_empty()).then(|| buffer.split().freeze()))
    });
    let frames = chunks.map(|chunk| Ok::<_, BoxError>(Frame::data(chunk)));
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
