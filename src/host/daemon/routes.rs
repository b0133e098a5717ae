//! The HTTP API on the host's own unix socket, and the OpenAPI document that describes it.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Daemon;
use super::guests::GuestFailure;
use super::outgoing::MigrateFailure;
use crate::host::api::ApiError;
use crate::host::api::check::CheckReport;
use crate::host::api::guest::{GuestInfo, StartGuest};
use crate::host::api::host::{ConsoleText, Done, HostInfo};
use crate::host::api::migration::{MigrateRequest, Migration};
use crate::host::holder::protocol::GuestSeen;
use crate::host::report_page;
use crate::session::mode::TransferMode;

#[derive(OpenApi)]
#[openapi(info(
    title = "pageferry",
    description = "The API of a host's daemon, on its unix socket. Times are seconds since 1970, durations seconds, sizes bytes, \
                   rates bytes a second."
))]
struct Document;

type Shared = State<Arc<Daemon>>;

/// Why a request was not obeyed, on its way to the caller.
struct Failure(StatusCode, ApiError);

impl Failure {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self(status, ApiError { error: error.into(), failed_checks: Vec::new() })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<GuestFailure> for Failure {
    fn from(failure: GuestFailure) -> Self {
        let status = match failure {
            GuestFailure::Unknown(_) => StatusCode::NOT_FOUND,
            GuestFailure::Refused(_) => StatusCode::CONFLICT,
            GuestFailure::Process(_) | GuestFailure::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, failure.to_string())
    }
}

impl From<MigrateFailure> for Failure {
    fn from(failure: MigrateFailure) -> Self {
        let failed_checks = match &failure {
            MigrateFailure::Checks(checks) => checks.clone(),
            _ => Vec::new(),
        };
        Self(StatusCode::CONFLICT, ApiError { error: failure.to_string(), failed_checks })
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, rejection.body_text())
    }
}

type Answer<T> = Result<Json<T>, Failure>;
type Asked<T> = Result<Json<T>, JsonRejection>;

fn api() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(host))
        .routes(routes!(guests, start_guest))
        .routes(routes!(guest, stop_guest))
        .routes(routes!(console))
        .routes(routes!(verify))
        .routes(routes!(migrate))
        .routes(routes!(check))
        .routes(routes!(migrations))
        .routes(routes!(migration))
        .routes(routes!(cancel))
        .routes(routes!(report))
        .routes(routes!(history))
        .routes(routes!(metrics))
}

/// The routes.
pub fn router(daemon: Arc<Daemon>) -> Router {
    let (router, document) = api().split_for_parts();
    let document = Json(document);
    router.route("/v1/openapi.json", axum::routing::get(move || async move { document })).with_state(daemon)
}

/// The OpenAPI document, as JSON.
#[must_use]
pub fn document() -> String {
    api().split_for_parts().1.to_pretty_json().unwrap_or_default()
}

/// The host, and how its daemon stands.
#[utoipa::path(get, path = "/v1/host", responses((status = 200, body = HostInfo)))]
async fn host(State(daemon): Shared) -> Json<HostInfo> {
    Json(daemon.host_info().await)
}

/// Every guest of this host.
#[utoipa::path(get, path = "/v1/guests", responses((status = 200, body = Vec<GuestInfo>)))]
async fn guests(State(daemon): Shared) -> Json<Vec<GuestInfo>> {
    Json(daemon.guest_infos())
}

/// Starts a guest, and answers when it has written all its memory once.
#[utoipa::path(post, path = "/v1/guests", request_body = StartGuest,
    responses((status = 200, body = GuestInfo), (status = 409, body = ApiError)))]
async fn start_guest(State(daemon): Shared, asked: Asked<StartGuest>) -> Answer<GuestInfo> {
    let Json(asked) = asked?;
    // To its end also when the caller hangs up.
    let started = tokio::spawn(async move { daemon.start_guest(asked).await }).await;
    match started {
        Ok(started) => Ok(Json(started?)),
        Err(error) => Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

/// A guest, with what it has seen of itself.
#[utoipa::path(get, path = "/v1/guests/{name}", params(("name" = String, Path,)),
    responses((status = 200, body = GuestInfo), (status = 404, body = ApiError)))]
async fn guest(State(daemon): Shared, Path(name): Path<String>) -> Answer<GuestInfo> {
    Ok(Json(daemon.guest(&name).await?))
}

/// Ends a guest. One that was lost is forgotten.
#[utoipa::path(delete, path = "/v1/guests/{name}", params(("name" = String, Path,)),
    responses((status = 200, body = Done), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn stop_guest(State(daemon): Shared, Path(name): Path<String>) -> Answer<Done> {
    Ok(Json(Done { what: daemon.stop_guest(&name).await? }))
}

/// What came out of a guest's serial port since somebody asked last.
#[utoipa::path(get, path = "/v1/guests/{name}/console", params(("name" = String, Path,)),
    responses((status = 200, body = ConsoleText), (status = 404, body = ApiError)))]
async fn console(State(daemon): Shared, Path(name): Path<String>) -> Answer<ConsoleText> {
    Ok(Json(ConsoleText { text: daemon.console(&name).await? }))
}

/// Has a guest look at every page that it wrote.
#[utoipa::path(post, path = "/v1/guests/{name}/verify", params(("name" = String, Path,)),
    responses((status = 200, body = Seen), (status = 404, body = ApiError)))]
async fn verify(State(daemon): Shared, Path(name): Path<String>) -> Answer<Seen> {
    Ok(Json(Seen { seen: daemon.verify_guest(&name).await? }))
}

/// What a guest has seen of itself.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Seen {
    /// Heartbeats, writes, and what was found right and wrong.
    #[schema(value_type = Object)]
    pub seen: GuestSeen,
}

/// Begins to move a guest; the migration goes on by itself.
#[utoipa::path(post, path = "/v1/guests/{name}/migrate", params(("name" = String, Path,)), request_body = MigrateRequest,
    responses((status = 200, body = Migration), (status = 409, body = ApiError)))]
async fn migrate(
    State(daemon): Shared,
    Path(name): Path<String>,
    asked: Asked<MigrateRequest>,
) -> Answer<Migration> {
    let Json(asked) = asked?;
    Ok(Json(daemon.migrate(&name, asked)?))
}

/// What is to be checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckAsked {
    /// The destination, as in a migration.
    pub to: String,
    /// The mode, as in a migration.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mode: Option<TransferMode>,
    /// The QEMU that waits at the destination, as in a migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<String>,
}

/// Does the checks of a migration, and nothing else.
#[utoipa::path(post, path = "/v1/guests/{name}/check", params(("name" = String, Path,)), request_body = CheckAsked,
    responses((status = 200, body = CheckReport), (status = 409, body = ApiError)))]
async fn check(
    State(daemon): Shared,
    Path(name): Path<String>,
    asked: Asked<CheckAsked>,
) -> Answer<CheckReport> {
    let Json(asked) = asked?;
    Ok(Json(daemon.check(&name, &asked).await?))
}

/// Every migration that is not over.
#[utoipa::path(get, path = "/v1/migrations", responses((status = 200, body = Vec<Migration>)))]
async fn migrations(State(daemon): Shared) -> Json<Vec<Migration>> {
    Json(daemon.active_migrations())
}

/// A migration, under way or over; the beginning of its identifier is enough, and so is the name of a guest that moves.
#[utoipa::path(get, path = "/v1/migrations/{id}", params(("id" = String, Path,)),
    responses((status = 200, body = Migration), (status = 404, body = ApiError)))]
async fn migration(State(daemon): Shared, Path(id): Path<String>) -> Answer<Migration> {
    let found = daemon.find_migration(&id).map_err(|why| Failure::new(StatusCode::NOT_FOUND, why))?;
    Ok(Json(found))
}

/// Ends a migration, if that is still possible; the guest then goes on at the source.
#[utoipa::path(post, path = "/v1/migrations/{id}/cancel", params(("id" = String, Path,)),
    responses((status = 200, body = Done), (status = 409, body = ApiError)))]
async fn cancel(State(daemon): Shared, Path(id): Path<String>) -> Answer<Done> {
    let what = daemon.cancel(&id).await.map_err(|why| Failure::new(StatusCode::CONFLICT, why))?;
    Ok(Json(Done { what }))
}

/// A page about a migration that needs no network.
#[utoipa::path(get, path = "/v1/migrations/{id}/report", params(("id" = String, Path,)),
    responses((status = 200, body = String, content_type = "text/html"), (status = 404, body = ApiError)))]
async fn report(State(daemon): Shared, Path(id): Path<String>) -> Result<Html<String>, Failure> {
    let found = daemon.find_migration(&id).map_err(|why| Failure::new(StatusCode::NOT_FOUND, why))?;
    Ok(Html(report_page::page(&found)))
}

/// How much of the history.
#[derive(Debug, Deserialize, IntoParams)]
struct Window {
    /// So many, the newest first; 50 without it.
    limit: Option<usize>,
}

/// Migrations that are over, the newest first.
#[utoipa::path(get, path = "/v1/history", params(Window), responses((status = 200, body = Vec<Migration>)))]
async fn history(State(daemon): Shared, Query(window): Query<Window>) -> Json<Vec<Migration>> {
    Json(daemon.history.list(window.limit.unwrap_or(50)))
}

/// Metrics in the OpenMetrics text format, for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
async fn metrics(State(daemon): Shared) -> Response {
    daemon.metrics.guests(&daemon.guest_infos());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], daemon.metrics.encode()).into_response()
}

#[cfg(test)]
mod tests {
    use super::document;

    /// A file of the documentation.
    fn documents(name: &str) -> String {
        format!("{}/docs/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn the_document_is_the_one_of_the_code() {
        let (path, code) = (documents("openapi.json"), document() + "\n");
        if std::env::var_os("PAGEFERRY_BLESS").is_some() {
            std::fs::write(&path, &code).expect("docs can be written");
        }
        let documented = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(documented == code, "{path} is out of date; PAGEFERRY_BLESS=1 rewrites it:\n{code}");
    }

    /// What stands first in the cells of docs/api.md: `GET /v1/host`.
    #[test]
    fn every_route_and_no_other_is_described_for_people() {
        let document: serde_json::Value = serde_json::from_str(&document()).expect("it is JSON");
        let paths = document["paths"].as_object().expect("it has paths");
        let mut routes: Vec<String> = paths
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().into_iter().flat_map(|methods| methods.keys());
                methods.map(move |method| format!("{} {path}", method.to_uppercase()))
            })
            .chain(["GET /v1/openapi.json".to_owned()])
            .collect();
        let text = std::fs::read_to_string(documents("api.md")).expect("docs can be read");
        let mut described: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
            .filter(|(cell, _)| cell.contains(" /"))
            .map(|(cell, _)| cell.to_owned())
            .collect();
        routes.sort();
        described.sort();
        assert_eq!(described, routes);
    }
}
