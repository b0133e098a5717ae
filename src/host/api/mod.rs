//! What the daemon's API speaks: the JSON of its requests and answers, shared by daemon, command line and history.
//!
//! Names are stable; fields may be added. Times are seconds since 1970, durations seconds, sizes bytes, rates bytes a second,
//! unless the name says otherwise.

pub mod check;
pub mod client;
pub mod guest;
pub mod host;
pub mod migration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiError {
    /// What was wrong and what to do, in a sentence or two.
    pub error: String,
    /// The checks that failed, when that was the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_checks: Vec<check::Check>,
}
