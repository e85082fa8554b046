//! The NoCloud seed of an instance: `cloudInitNoCloud` of its volumes (KubeVirt API reference, CloudInitNoCloudSource) with the keys of
//! `accessCredentials`, or a Secret that is attached as a disk labelled `cidata`.

use super::{
    objects::{InstanceSpec, Key, Reference},
    shared::{Shared, failed},
    translate::SeedSource,
};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::Api;
use rudder_core::{Error, ErrorKind, Result, backend::Seed};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    io::{self, Cursor, Write as _},
    sync::Arc,
};

/// Makes the seed of an instance.
pub(super) async fn seed(
    shared: &Shared,
    key: &Key,
    spec: &InstanceSpec,
    source: SeedSource<'_>,
) -> Result<Seed> {
    let cloud_init = match source {
        SeedSource::CloudInit(cloud_init) => cloud_init,
        SeedSource::Secret(name) => return from_secret(data(shared, key, name).await?),
    };
    let user_data = match &cloud_init.secret_ref {
        Some(secret) => Some(value(shared, key, secret, ["userdata", "userData"]).await?),
        None => cloud_init.user_data.clone().map(String::into_bytes),
    };
    let network = match &cloud_init.network_data_secret_ref {
        Some(secret) => Some(value(shared, key, secret, ["networkdata", "networkData"]).await?),
        None => cloud_init.network_data.clone().map(String::into_bytes),
    };
    let network = network.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let mut keys = Map::new();
    for credential in &spec.access_credentials {
        let credential = &credential["sshPublicKey"];
        let secret = credential["source"]["secret"]["secretName"].as_str();
        if let (Some(name), Some(_)) = (secret, credential["propagationMethod"].get("noCloud")) {
            for bytes in data(shared, key, name).await?.into_values() {
                let text = String::from_utf8_lossy(&bytes.0).into_owned();
                for line in text.lines().filter(|line| !line.trim().is_empty()) {
                    keys.insert(keys.len().to_string(), line.trim().into());
                }
            }
        }
    }
    let mut meta_data = json!({
        "instance-id": format!("{}.{}", key.name, key.namespace),
        "local-hostname": spec.hostname.as_ref().unwrap_or(&key.name),
    });
    if !keys.is_empty() {
        meta_data["public-keys"] = Value::Object(keys);
    }
    let meta_data = meta_data.to_string();
    let user_data = user_data.unwrap_or_default();
    let mut files = vec![("meta-data", meta_data.as_bytes()), ("user-data", user_data.as_slice())];
    if let Some(network) = &network {
        files.push(("network-config", network.as_bytes()));
    }
    let image = medium(&files).map_err(|error| Error::io("make the medium of a seed", error))?;
    Ok(Seed::new(meta_data, user_data, network, image))
}

/// Makes the seed whose files are these.
fn from_secret(mut files: BTreeMap<String, ByteString>) -> Result<Seed> {
    let contents: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.0.as_slice())).collect();
    let image = medium(&contents).map_err(|error| Error::io("make the medium of a seed", error))?;
    let mut text =
        |name: &str| files.remove(name).map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
    let (meta_data, network) = (text("meta-data").unwrap_or_default(), text("network-config"));
    let user_data = files.remove("user-data").map(|bytes| bytes.0).unwrap_or_default();
    Ok(Seed::new(meta_data, user_data, network, image))
}

/// Returns the value of a secret under the first of these names that it has.
async fn value(shared: &Shared, key: &Key, secret: &Reference, names: [&str; 2]) -> Result<Vec<u8>> {
    let mut data = data(shared, key, &secret.name).await?;
    names.into_iter().find_map(|name| data.remove(name)).map(|bytes| bytes.0).ok_or_else(|| {
        let message = format!("expected secret {} to have the key {}, but it has not", secret.name, names[0]);
        Error::new(ErrorKind::InvalidInput, message)
    })
}

async fn data(shared: &Shared, key: &Key, secret: &str) -> Result<BTreeMap<String, ByteString>> {
    let api: Api<Secret> = Api::namespaced(shared.client.clone(), &key.namespace);
    let secret = api.get(secret).await.map_err(failed("read a secret of an instance"))?;
    Ok(secret.data.unwrap_or_default())
}

/// Makes a FAT file system labelled `cidata` with these files.
fn medium(files: &[(&str, &[u8])]) -> io::Result<Arc<[u8]>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum();
    let mut disk = Cursor::new(vec![0; (content + (512 << 10)).next_multiple_of(64 << 10)]);
    fatfs::format_volume(&mut disk, fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     "))?;
    {
        let system = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (name, bytes) in files {
            let mut file = system.root_dir().create_file(name)?;
            file.truncate()?;
            file.write_all(bytes)?;
        }
        system.unmount()?;
    }
    Ok(disk.into_inner().into())
}
