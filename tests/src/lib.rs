//! What Portcullis is tested with: the lab of namespaces, veth and tap that every end-to-end test is built in.

pub mod lab;
