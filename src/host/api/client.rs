//! Talks to this host's daemon over its unix socket.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::ApiError;
use crate::host::config::HostFileError;

/// Why a request to the daemon came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Somebody else's.
    #[error(
        "the daemon's socket {path} is not for this user: run the command as root, or as the user that the daemon has"
    )]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// Nobody answers.
    #[error(
        "no daemon answers at {path}: {cause}; start one (`pageferry serve`), or name its host file with --config"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// The connection broke, or what came is no answer.
    #[error("the daemon's answer cannot be read: {0}")]
    Broken(String),
    /// It is not known where the daemon is.
    #[error(transparent)]
    HostFile(#[from] HostFileError),
    /// What it answered cannot be kept.
    #[error("{path} cannot be written: {cause}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// The daemon says no.
    #[error("{}", .0.error)]
    Refused(ApiError),
}

impl ClientError {
    /// The same as the daemon would say it.
    #[must_use]
    pub fn as_api_error(&self) -> ApiError {
        match self {
            Self::Refused(error) => error.clone(),
            other => ApiError { error: other.to_string(), failed_checks: Vec::new() },
        }
    }
}

/// A daemon's API.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The API behind this socket. Nothing is opened before the first request.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        parse(&self.call(Method::GET, path, Vec::new()).await?)
    }

    /// Asks for a text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn text(&self, path: &str) -> Result<String, ClientError> {
        let bytes = self.call(Method::GET, path, Vec::new()).await?;
        String::from_utf8(bytes.to_vec()).map_err(|error| ClientError::Broken(error.to_string()))
    }

    /// Has something done.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        asked: &Q,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(asked).map_err(|error| ClientError::Broken(error.to_string()))?;
        parse(&self.call(Method::POST, path, body).await?)
    }

    /// Has something removed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        parse(&self.call(Method::DELETE, path, Vec::new()).await?)
    }

    async fn call(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes, ClientError> {
        let broken = |error: hyper::Error| ClientError::Broken(crate::engine::chain(&error));
        let socket = || self.socket.clone();
        let stream = UnixStream::connect(&self.socket).await.map_err(|cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { path: socket() },
            _ => ClientError::Connect { path: socket(), cause },
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let serving = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Broken(error.to_string()))?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await.map_err(broken)?.to_bytes();
        drop(sender);
        serving.abort();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => ClientError::Refused(error),
            Err(_) => ClientError::Broken(format!("{status}: {}", String::from_utf8_lossy(&bytes))),
        })
    }
}

fn parse<A: DeserializeOwned>(bytes: &[u8]) -> Result<A, ClientError> {
    serde_json::from_slice(bytes).map_err(|error| ClientError::Broken(error.to_string()))
}

/// A text as a part of a path.
#[must_use]
pub fn segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_within_its_part_of_the_path() {
        assert_eq!(segment("vm-1.a_b~"), "vm-1.a_b~");
        assert_eq!(segment("a/../b?c ä"), "a%2F..%2Fb%3Fc%20%C3%A4");
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_named() {
        let error = Client::new(Path::new("/nowhere/api.sock")).get::<()>("/v1/host").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "no daemon answers at /nowhere/api.sock: No such file or directory (os error 2); start one (`pageferry serve`), \
             or name its host file with --config"
        );
    }
}
