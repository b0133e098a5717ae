//! What other hosts' daemons may ask.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde::Serialize;

use super::Daemon;
use crate::host::api::ApiError;
use crate::host::peer::messages::{AdmitRequest, CheckRequest, Gone};
use crate::host::peer::server::Caller;

/// The largest request: a guest's configuration of 1 MiB in hexadecimal digits, and as much again.
const MOST: usize = 4 << 20;

/// The routes. Requests carry their [`Caller`] as an extension.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/peer/v1/check", post(check))
        .route("/peer/v1/admit", post(admit))
        .route("/peer/v1/migrations/{id}", post(migration))
        .route("/peer/v1/migrations/{id}/gone", post(gone))
        .layer(DefaultBodyLimit::max(MOST))
        .with_state(daemon)
}

fn answer<T: Serialize>(caller: &Caller, done: Result<T, String>) -> Response {
    match done {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            tracing::warn!("a request from {} is refused: {error}", caller.address);
            (StatusCode::FORBIDDEN, Json(ApiError { error, failed_checks: Vec::new() })).into_response()
        }
    }
}

async fn check(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Json(asked): Json<CheckRequest>,
) -> Response {
    answer(&caller, daemon.answer_check(&caller, &asked).await)
}

async fn admit(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Json(asked): Json<AdmitRequest>,
) -> Response {
    // To its end also when the caller hangs up: a place that is half made is nobody's.
    let task = {
        let caller = caller.clone();
        tokio::spawn(async move { daemon.admit_guest(&caller, &asked).await })
    };
    answer(&caller, task.await.unwrap_or_else(|error| Err(error.to_string())))
}

async fn migration(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Response {
    answer(&caller, daemon.answer_migration(&caller, &id))
}

async fn gone(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Json(gone): Json<Gone>,
) -> Response {
    answer(&caller, daemon.peer_is_gone(&caller, &id, gone).await)
}
