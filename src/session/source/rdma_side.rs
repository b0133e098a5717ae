//! What a source has for RDMA: guest RAM on this host's devices. Without the feature `rdma` there is none.

#[cfg(feature = "rdma")]
pub(super) use with::RdmaSide;
#[cfg(not(feature = "rdma"))]
pub(super) use without::RdmaSide;

#[cfg(feature = "rdma")]
mod with {
    use std::net::TcpStream;

    use crate::channel::rdma::{self, RdmaMemory, RdmaOptions};
    use crate::channel::{ChannelError, OpenChannel};
    use crate::pageset::PageSet;
    use crate::session::error::SessionError;
    use crate::session::mode::TransferMode;
    use crate::session::path::Path;
    use crate::session::source::SourceOptions;

    /// Guest RAM on this host's devices.
    #[derive(Debug)]
    pub(in crate::session::source) struct RdmaSide {
        memory: RdmaMemory,
        /// What is going to be sent, as far as that is known: its pieces are registered at once.
        wanted: PageSet,
        options: RdmaOptions,
    }

    impl RdmaSide {
        /// `None` where RDMA is not wanted, or there is none.
        pub(in crate::session::source) fn of(options: &SourceOptions) -> Option<Self> {
            let (fabric, rdma) = options.rdma.on().filter(|_| options.mode == TransferMode::Rdma)?;
            let pages = options.memory.layout().total_pages();
            // Where that cannot be told, each piece is registered when its first page goes.
            let wanted = options.memory.touched().unwrap_or_else(|_| PageSet::empty(pages));
            let memory = RdmaMemory::to_read(fabric.clone(), options.memory.clone());
            let rdma = RdmaOptions { link_timeout: options.link_timeout, ..*rdma };
            Some(Self { memory, wanted, options: rdma })
        }

        /// Whether a path leads over a device, as far as that is known before it is dialled.
        pub(in crate::session::source) fn look_at(&self, path: &Path) -> Result<(), SessionError> {
            let Some(source) = path.source else { return Ok(()) };
            match self.memory.fabric().port_at(source.to_canonical()) {
                Ok(_) => Ok(()),
                Err(reason) => Err(SessionError::NoRdma(format!("this host: {reason}"))),
            }
        }

        pub(in crate::session::source) fn open(
            &self,
            stream: TcpStream,
        ) -> Result<OpenChannel, ChannelError> {
            rdma::open(stream, &self.memory, &self.wanted, &self.options)
        }

        pub(in crate::session::source) fn end(&self) {
            self.memory.end();
        }
    }
}

#[cfg(not(feature = "rdma"))]
mod without {
    use std::net::TcpStream;

    use crate::channel::{ChannelError, OpenChannel};
    use crate::session::error::SessionError;
    use crate::session::path::Path;
    use crate::session::source::SourceOptions;

    /// Nothing.
    #[derive(Debug)]
    pub(in crate::session::source) enum RdmaSide {}

    impl RdmaSide {
        pub(in crate::session::source) fn of(_: &SourceOptions) -> Option<Self> {
            None
        }

        pub(in crate::session::source) fn look_at(&self, _: &Path) -> Result<(), SessionError> {
            match *self {}
        }

        pub(in crate::session::source) fn open(&self, _: TcpStream) -> Result<OpenChannel, ChannelError> {
            match *self {}
        }

        pub(in crate::session::source) fn end(&self) {
            match *self {}
        }
    }
}
