//! Answers made of one object.

use http::StatusCode;
use oarlock_kinds::Kind;
use oarlock_store::Record;
use serde_json::Value;

use crate::core::Context;
use crate::error::{ApiError, ApiResult};
use crate::negotiate::{Form, Spelling};
use crate::object;
use crate::table::{self, Include};
use crate::wire::{self, Answer};

/// A value in the negotiated spelling.
pub(crate) fn spelled(ctx: &Context, code: StatusCode, value: &Value) -> ApiResult<Answer> {
    match ctx.accept.spelling {
        Spelling::Json => Ok(wire::json(code, value)),
        Spelling::Yaml => {
            let text = serde_yaml_ng::to_string(value).map_err(ApiError::internal)?;
            Ok(wire::answer(code, "application/yaml", text))
        }
    }
}

/// A stored object in the negotiated form; its bytes as they are where that is what was asked for.
pub(crate) fn record_answer(ctx: &Context, code: StatusCode, kind: &Kind, record: &Record) -> ApiResult<Answer> {
    if ctx.accept.form == Form::Object && ctx.accept.spelling == Spelling::Json && object::is_native(kind) {
        return Ok(wire::answer(code, "application/json", record.value().clone()));
    }
    value_answer(ctx, code, kind, object::parse_as(kind, record))
}

/// An object that is not (or no longer) stored, in the negotiated form.
pub(crate) fn value_answer(ctx: &Context, code: StatusCode, kind: &Kind, object: Value) -> ApiResult<Answer> {
    let include = Include::parse(ctx.info.query.get("includeObject"));
    spelled(ctx, code, &table::render(kind, object, ctx.accept.form, include))
}
